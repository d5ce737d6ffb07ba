use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    vec![
        leaf(0, 0, [0xd, word(b"Auth"), word(b"cAMD"), word(b"enti")]),
        leaf(1, 0, [0xa0_0f11, 0, 0x7eda_3203, 0x178b_fbff]),
        leaf(7, 0, [0, 0x219c_97a9, 0x40_068c, 0]),
        leaf(0xd, 0, [7, 0x340, 0x340, 0]),
        leaf(0xd, 2, [0x100, 0x240, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x75c2_37ff, 0x2fd3_fbff]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0, 0]),
    ]
}

fn host(entries: Vec<kvm_cpuid_entry2>) -> HostCpu {
    HostCpu {
        cpuid: CommonCpuid::from_entries(entries),
        tsc_khz: Some(2_596_132),
        tsc_scaling: false,
        xsave_size: 4096,
        kvmclock: true,
        nested: true,
    }
}

fn profile() -> CpuProfile {
    let host = host(amd());
    CpuProfile::new(&host.cpuid, &host).unwrap()
}

/// What is said of a host that `change` makes of the one where the VM was saved.
fn said(change: impl FnOnce(&mut HostCpu)) -> Vec<String> {
    let mut host = host(amd());
    change(&mut host);
    let mismatches = profile().compare(&host);
    mismatches.iter().map(ToString::to_string).collect()
}

fn said_of_cpuid(change: impl FnOnce(&mut Vec<kvm_cpuid_entry2>)) -> Vec<String> {
    said(|host| {
        let mut entries = amd();
        change(&mut entries);
        host.cpuid = CommonCpuid::from_entries(entries);
    })
}

#[test]
fn same_host_will_do() {
    assert_eq!(said(|_| {}), Vec::<String>::new());
}

#[test]
fn host_with_more_will_do() {
    let said = said_of_cpuid(|entries| {
        entries[2].ebx |= 1 << 30;
        entries[3].eax |= 1 << 9;
        entries[6].eax = 0x3934;
        entries.push(leaf(0xd, 9, [8, 0x380, 0, 0]));
    });
    assert_eq!(said, Vec::<String>::new());
}

#[test]
fn lacking_features_are_named() {
    let said = said_of_cpuid(|entries| {
        entries[2].ebx &= !(1 << 5 | 1 << 29);
        entries[5].edx &= !(1 << 8);
    });
    assert_eq!(
        said,
        [
            "CPUID leaf 0x7 ebx: the VM has 0x20000020 (avx2, sha_ni), which this host lacks",
            "CPUID leaf 0x80000001 edx: the VM has 0x100, which this host lacks",
        ]
    );
}

#[test]
fn lacking_leaf_lacks_all_its_features() {
    let said = said_of_cpuid(|entries| entries.retain(|leaf| leaf.function != 7));
    assert_eq!(said.len(), 2, "{said:?}");
}

#[test]
fn other_cpus_are_named() {
    let said = said_of_cpuid(|entries| {
        entries[0].ebx = u32::from_le_bytes(*b"Hygo");
        entries[0].edx = u32::from_le_bytes(*b"nGen");
        entries[0].ecx = u32::from_le_bytes(*b"uine");
        entries[4].ebx = 0x280;
        entries[6].eax = 0x302b;
    });
    assert_eq!(
        said,
        [
            r#"the VM's CPUs are of "AuthenticAMD", and this host's of "HygonGenuine""#,
            "the VM has 48 physical address bits, and this host 43",
            "XSAVE component 2 is at byte 576 and 256 bytes long for the VM, and at 640 and 256 on this host",
        ]
    );
}

#[test]
fn other_hosts_are_named() {
    let said = said(|host| {
        host.tsc_khz = Some(3_000_000);
        host.xsave_size = 2048;
        host.kvmclock = false;
        host.nested = false;
    });
    assert_eq!(
        said,
        [
            "the VM's time stamp counter has 2596132 kHz, this host's 3000000 kHz, and this host's CPU cannot \
             scale it",
            "the VM has 4096 bytes of extended CPU state (XSAVE), and this host 2048",
            "this host's KVM cannot set the guest's clock, kvmclock",
            "the VM can run VMs of its own, and this host's KVM cannot take the state of that",
        ]
    );
}

/// What a kernel adds for guests with VMs of their own keeps none of the others from going to an older one.
#[test]
fn guest_without_nesting_needs_nothing_of_it() {
    let newer = || {
        let mut entries = amd();
        entries.push(leaf(0x8000_000a, 0, [1, 8, 0, 0x49]));
        host(entries)
    };
    let mut older = newer();
    let mut entries = amd();
    entries.push(leaf(0x8000_000a, 0, [1, 8, 0, 9]));
    older.cpuid = CommonCpuid::from_entries(entries);
    let said = |profile: CpuProfile| {
        profile
            .compare(&older)
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    let nesting = CpuProfile::new(&newer().cpuid, &newer()).unwrap();
    assert_eq!(
        said(nesting),
        ["CPUID leaf 0x8000000a edx: the VM has 0x40 (flushbyasid), which this host lacks"]
    );
    let cpuid = newer().cpuid.without_nesting();
    assert_eq!(said(CpuProfile::new(&cpuid, &newer()).unwrap()), [""; 0]);
    older.nested = false;
    let cpuid = newer().cpuid.without_nesting();
    assert_eq!(
        CpuProfile::new(&cpuid, &newer()).unwrap().compare(&older),
        []
    );
}

#[test]
fn frequency_may_differ_a_little_or_be_scaled() {
    assert_eq!(said(|host| host.tsc_khz = Some(2_596_500)), [""; 0]);
    let scaling = said(|host| {
        host.tsc_khz = Some(3_000_000);
        host.tsc_scaling = true;
    });
    assert_eq!(scaling, [""; 0]);
}

#[test]
fn guest_of_this_host_can_be_restored_here() {
    if !crate::test_machine::has_kvm() {
        return;
    }
    let kvm = crate::kvm::open().unwrap();
    let host = HostCpu::new(&kvm, 2).unwrap();
    let profile = CpuProfile::new(&CommonCpuid::new(&kvm, 2).unwrap(), &host).unwrap();
    assert_eq!(profile.compare(&host), []);
}

#[test]
fn profile_comes_back() {
    let profile = profile();
    let text = serde_json::to_string(&profile).unwrap();
    assert_eq!(serde_json::from_str::<CpuProfile>(&text).unwrap(), profile);
    assert_eq!(profile.cpuid().entries(), amd());
}

#[test]
fn endless_cpuid_is_refused() {
    let mut value = serde_json::to_value(profile()).unwrap();
    let leaf = value["cpuid"][0].clone();
    value["cpuid"] = std::iter::repeat_n(leaf, 257).collect();
    let error = serde_json::from_value::<CpuProfile>(value).unwrap_err();
    assert!(
        error.to_string().contains("256 elements at most"),
        "{error}"
    );
}
