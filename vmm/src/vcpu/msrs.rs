//! Reading and writing model specific registers.

use std::ops::{Range, RangeInclusive};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// IA32_TIME_STAMP_COUNTER (Intel SDM, volume 4, table 2-2).
pub(super) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// The memory type range registers (Intel SDM, volume 3, 11.11): the default type, the fixed ranges, and as many variable
/// ones as KVM has (`KVM_NR_VAR_MTRR` in the kernel's arch/x86/include/asm/kvm_host.h).
///
/// KVM keeps them for each guest and does not list them. Where they were lost, a guest that reads them would find all its
/// memory uncached; and before Linux 6.11 it would be, on an Intel CPU, with a device given to it whose DMA does not snoop.
pub(super) fn mtrrs() -> impl Iterator<Item = u32> {
    const DEFAULT_TYPE: u32 = 0x2ff;
    const FIXED: [u32; 3] = [0x250, 0x258, 0x259];
    const FIXED_4K: RangeInclusive<u32> = 0x268..=0x26f;
    const VARIABLE: Range<u32> = 0x200..0x200 + 2 * 8;
    FIXED
        .into_iter()
        .chain(FIXED_4K)
        .chain(VARIABLE)
        .chain([DEFAULT_TYPE])
}

/// A model specific register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Msr {
    pub(super) index: u32,
    pub(super) data: u64,
}

/// Reads each of these registers that can be read: KVM lists some that depend upon the guest's CPUID.
pub(super) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, kvm_ioctls::Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let mut msrs = for_kvm(rest.iter().map(|&index| Msr { index, data: 0 }))?;
        // KVM stops at the first that it cannot read, and says how many it has read.
        let read = fd.get_msrs(&mut msrs)?;
        let entries = msrs.as_slice().iter().take(read);
        values.extend(entries.map(|&kvm_msr_entry { index, data, .. }| Msr { index, data }));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes each of these registers that can be written, and returns those that could not, with what is there instead. One
/// that reads the same anyway is not among them, nor is one that is zero and not here.
pub(super) fn write(
    fd: &VcpuFd,
    values: &[Msr],
) -> Result<Vec<(Msr, Option<u64>)>, kvm_ioctls::Error> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let written = fd.set_msrs(&for_kvm(rest.iter().copied())?)?;
        if let Some(&msr) = rest.get(written) {
            let here = read(fd, &[msr.index])?.first().map(|here| here.data);
            if here.unwrap_or(0) != msr.data {
                refused.push((msr, here));
            }
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(refused)
}

fn for_kvm(values: impl Iterator<Item = Msr>) -> Result<Msrs, kvm_ioctls::Error> {
    let entries: Vec<_> = values
        .map(|Msr { index, data }| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}
