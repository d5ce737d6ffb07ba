//! Reading and writing model specific registers.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// IA32_TIME_STAMP_COUNTER (Intel SDM, volume 4, table 2-2).
pub(super) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

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
