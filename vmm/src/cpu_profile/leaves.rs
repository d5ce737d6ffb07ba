//! What each register of CPUID tells, and in which way one CPU can have less of it than another.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

use super::Mismatch;

/// A register that CPUID returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Register {
    function: u32,
    index: u32,
    name: Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Name::{Eax, Ebx, Ecx, Edx};

const fn register(function: u32, index: u32, name: Name) -> Register {
    Register {
        function,
        index,
        name,
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leaf {:#x}", self.function)?;
        if self.index > 0 {
            write!(f, ".{}", self.index)?;
        }
        let name = match self.name {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        };
        write!(f, " {name}")
    }
}

/// All that a CPUID tells.
#[derive(Clone, Copy)]
pub(super) struct Leaves<'a>(pub(super) &'a [kvm_cpuid_entry2]);

impl Leaves<'_> {
    /// Zero where there is nothing, as on a CPU.
    fn read(self, register: Register) -> u32 {
        let Register {
            function, index, ..
        } = register;
        let mut entries = self.0.iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == (function, index));
        entry.map_or(0, |entry| match register.name {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        })
    }

    /// Whether the guest can run guests of its own.
    pub(super) fn can_nest(self) -> bool {
        const NESTING: [(Register, u32); 2] = [
            (register(1, 0, Ecx), 5),           // VMX
            (register(0x8000_0001, 0, Ecx), 2), // SVM
        ];
        let mut bits = NESTING.iter();
        bits.any(|&(register, bit)| self.read(register) & 1 << bit != 0)
    }

    fn vendor(self) -> String {
        let registers = [Ebx, Edx, Ecx].map(|name| self.read(register(0, 0, name)));
        let bytes: Vec<_> = registers
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// In what `here` is less than `saved`.
pub(super) fn compare(saved: Leaves<'_>, here: Leaves<'_>) -> Vec<Mismatch> {
    let mut mismatches = Vec::new();
    if saved.vendor() != here.vendor() {
        mismatches.push(Mismatch::Vendor {
            saved: saved.vendor(),
            here: here.vendor(),
        });
    }
    for &register in FEATURES {
        let bits = saved.read(register) & !here.read(register);
        if bits != 0 {
            mismatches.push(Mismatch::Features { register, bits });
        }
    }
    for &(register, shift, width, what) in NUMBERS {
        let field =
            |leaves: Leaves<'_>| u64::from(leaves.read(register) >> shift & ((1 << width) - 1));
        let (saved, here) = (field(saved), field(here));
        if saved > here {
            mismatches.push(Mismatch::AtMost { what, saved, here });
        }
    }
    for &register in SAME {
        if ![0, here.read(register)].contains(&saved.read(register)) {
            mismatches.push(Mismatch::Differs(register));
        }
    }
    mismatches.extend((XSAVE_EXTENDED..u64::BITS).filter_map(|component| {
        let place =
            |leaves: Leaves<'_>| [Ebx, Eax].map(|name| leaves.read(register(0xd, component, name)));
        let ([saved_at, saved_size], [at, size]) = (place(saved), place(here));
        let differs = saved_size != 0 && (saved_at, saved_size) != (at, size);
        differs.then_some(Mismatch::XsaveComponent {
            component,
            saved: (saved_at, saved_size),
            here: (at, size),
        })
    }));
    mismatches
}

/// The first component of the extended state whose place CPUID tells (Intel SDM, volume 1, 13.5).
const XSAVE_EXTENDED: u32 = 2;

/// Where a set bit is a feature (Intel SDM, volume 2, CPUID; AMD APM, volume 3, appendix E; the kernel's
/// Documentation/virt/kvm/x86/cpuid.rst).
const FEATURES: &[Register] = &[
    register(1, 0, Ecx),
    register(1, 0, Edx),
    register(6, 0, Eax),
    register(7, 0, Ebx),
    register(7, 0, Ecx),
    register(7, 0, Edx),
    register(7, 1, Eax),
    register(7, 1, Ebx),
    register(7, 1, Ecx),
    register(7, 1, Edx),
    register(7, 2, Edx),
    register(0xd, 0, Eax),
    register(0xd, 0, Edx),
    register(0xd, 1, Eax),
    register(0xd, 1, Ecx),
    register(0xd, 1, Edx),
    register(0x12, 0, Eax),
    register(0x14, 0, Ebx),
    register(0x14, 0, Ecx),
    register(0x4000_0001, 0, Eax),
    register(0x8000_0001, 0, Ecx),
    register(0x8000_0001, 0, Edx),
    register(0x8000_0007, 0, Edx),
    register(0x8000_0008, 0, Ebx),
    register(0x8000_000a, 0, Edx),
    register(0x8000_0021, 0, Eax),
    register(0x8000_0021, 0, Ecx),
    register(0x8000_0022, 0, Eax),
];

/// Fields (first bit and width) that count something.
const NUMBERS: &[(Register, u32, u32, &str)] = &[
    (register(0x8000_0008, 0, Eax), 0, 8, "physical address bits"),
    (register(0x8000_0008, 0, Eax), 8, 8, "linear address bits"),
    (
        register(0xa, 0, Eax),
        0,
        8,
        "as version of the performance monitoring",
    ),
    (register(0xa, 0, Eax), 8, 8, "performance counters"),
    (
        register(0xa, 0, Eax),
        16,
        8,
        "bits in a performance counter",
    ),
    (register(0xa, 0, Edx), 0, 5, "fixed performance counters"),
    (
        register(0xa, 0, Edx),
        5,
        8,
        "bits in a fixed performance counter",
    ),
    (register(0x8000_0022, 0, Ebx), 0, 4, "performance counters"),
    (register(0x24, 0, Ebx), 0, 8, "as version of AVX10"),
];

/// Registers that have to be the same if the guest has been told anything there: AMX's tiles.
const SAME: &[Register] = &[
    register(0x1d, 1, Eax),
    register(0x1d, 1, Ebx),
    register(0x1d, 1, Ecx),
    register(0x1e, 0, Ebx),
];

/// What bits are called that differ between the CPUs, or between the kernels' KVMs, that one is likely to have, as
/// /proc/cpuinfo and the kernel's cpufeatures.h spell it, and `KVM_FEATURE_*` of its kvm_para.h.
const NAMES: &[(Register, &[(u32, &str)])] = &[
    (
        register(1, 0, Ecx),
        &[
            (1, "pclmulqdq"),
            (5, "vmx"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc_deadline_timer"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        register(7, 0, Ebx),
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (
        register(7, 0, Ecx),
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (7, "shstk"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    ),
    (
        register(7, 0, Edx),
        &[
            (4, "fsrm"),
            (10, "md_clear"),
            (14, "serialize"),
            (20, "ibt"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "spec_ctrl"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    ),
    (
        register(0x8000_0001, 0, Ecx),
        &[(2, "svm"), (5, "abm"), (6, "sse4a"), (22, "topoext")],
    ),
    (
        register(0x8000_0001, 0, Edx),
        &[(20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")],
    ),
    (register(0x8000_0007, 0, Edx), &[(8, "invtsc")]),
    (
        register(7, 1, Eax),
        &[
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (7, "cmpccxadd"),
            (10, "fzrm"),
            (11, "fsrs"),
            (12, "fsrc"),
            (21, "amx_fp16"),
            (23, "avx_ifma"),
            (26, "lam"),
        ],
    ),
    (
        register(7, 2, Edx),
        &[
            (0, "intel_psfd"),
            (1, "ipred_ctrl"),
            (2, "rrsba_ctrl"),
            (3, "ddpd_u"),
            (4, "bhi_ctrl"),
            (5, "mcdt_no"),
        ],
    ),
    (
        register(0x4000_0001, 0, Eax),
        &[
            (4, "async_pf"),
            (5, "steal_time"),
            (6, "pv_eoi"),
            (7, "pv_unhalt"),
            (9, "pv_tlb_flush"),
            (10, "async_pf_vmexit"),
            (11, "pv_send_ipi"),
            (12, "poll_control"),
            (13, "pv_sched_yield"),
            (14, "async_pf_int"),
            (15, "msi_ext_dest_id"),
            (16, "hc_map_gpa_range"),
            (17, "migration_control"),
            (24, "clocksource_stable"),
        ],
    ),
    (
        register(0x8000_0008, 0, Ebx),
        &[
            (0, "clzero"),
            (2, "xsaveerptr"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "stibp"),
            (17, "stibp_always_on"),
            (24, "amd_ssbd"),
            (25, "virt_ssbd"),
            (26, "amd_ssb_no"),
            (28, "amd_psfd"),
            (29, "btc_no"),
            (30, "amd_ibpb_ret"),
        ],
    ),
    (
        register(0x8000_000a, 0, Edx),
        &[
            (0, "npt"),
            (1, "lbrv"),
            (3, "nrip_save"),
            (4, "tsc_scale"),
            (5, "vmcb_clean"),
            (6, "flushbyasid"),
            (10, "pausefilter"),
            (12, "pfthreshold"),
            (15, "v_vmsave_vmload"),
            (16, "vgif"),
            (25, "vnmi"),
            (28, "svme_addr_chk"),
        ],
    ),
    (
        register(0x8000_0021, 0, Eax),
        &[
            (0, "no_nested_data_bp"),
            (1, "wrmsr_xx_base_ns"),
            (2, "lfence_rdtsc"),
            (5, "verw_clear"),
            (6, "null_sel_clr_base"),
            (8, "autoibrs"),
            (9, "no_smm_ctl_msr"),
            (27, "sbpb"),
            (28, "ibpb_brtype"),
            (29, "srso_no"),
        ],
    ),
    (
        register(0x8000_0021, 0, Ecx),
        &[(1, "tsa_sq_no"), (2, "tsa_l1_no")],
    ),
];

/// Says which features these are.
pub(super) fn describe_bits(register: Register, bits: u32) -> String {
    let names = NAMES.iter().find(|(named, _)| *named == register);
    let names: Vec<_> = names
        .map_or(&[][..], |(_, names)| names)
        .iter()
        .filter(|(bit, _)| bits & 1 << bit != 0)
        .map(|(_, name)| *name)
        .collect();
    if names.is_empty() {
        format!("{bits:#x}")
    } else {
        format!("{bits:#x} ({})", names.join(", "))
    }
}
