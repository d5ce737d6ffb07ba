use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;

/// A configuration space with standard capabilities at these offsets, in this order. The id of each is its place.
fn chain(offsets: &[u8]) -> ConfigSpace {
    let mut config = ConfigSpace::new();
    config.set(header::STATUS, &Status::CAPABILITIES.bits().to_le_bytes());
    let mut pointer = header::CAPABILITIES;
    for (id, &offset) in (1..).zip(offsets) {
        config.set(pointer, &[offset]);
        config.set(offset.into(), &[id]);
        pointer = u16::from(offset) + 1;
    }
    config
}

/// A configuration space with extended capabilities at these offsets, in this order. The id of each is its place.
fn extended_chain(offsets: &[u16]) -> ConfigSpace {
    let mut config = ConfigSpace::new();
    let nexts = offsets.iter().skip(1).copied().chain([0]);
    for ((id, &offset), next) in (1u32..).zip(offsets).zip(nexts) {
        let header = u32::from(next) << 20 | 2 << 16 | id;
        config.set(offset, &header.to_le_bytes());
    }
    config
}

fn walk(config: &ConfigSpace) -> Vec<Result<(u8, u8), CapabilityError>> {
    capabilities(|offset| config.dword(offset))
        .map(|found| found.map(|capability| (capability.id, capability.offset)))
        .collect()
}

fn walk_extended(config: &ConfigSpace) -> Vec<Result<(u16, u16), CapabilityError>> {
    extended_capabilities(|offset| config.dword(offset))
        .map(|found| found.map(|capability| (capability.id, capability.offset)))
        .collect()
}

/// Offsets of some capabilities, in any order.
fn any_offsets() -> impl Strategy<Value = Vec<u8>> {
    let all: Vec<u8> = (0x40..=0xf8).step_by(8).collect();
    subsequence(all, 1..=24).prop_shuffle()
}

/// Offsets of some extended capabilities, in any order but for the first one.
fn any_extended_offsets() -> impl Strategy<Value = Vec<u16>> {
    let all: Vec<u16> = (0x108..0x1000).step_by(8).collect();
    subsequence(all, 0..=32)
        .prop_shuffle()
        .prop_map(|mut offsets| {
            offsets.insert(0, 0x100);
            offsets
        })
}

proptest! {
    #[test]
    fn walks_follow_the_list(standard in any_offsets(), extended in any_extended_offsets()) {
        let expected: Vec<_> = (1..).zip(standard.iter().copied()).map(Ok).collect();
        prop_assert_eq!(walk(&chain(&standard)), expected);
        let expected: Vec<_> = (1..).zip(extended.iter().copied()).map(Ok).collect();
        prop_assert_eq!(walk_extended(&extended_chain(&extended)), expected);
    }

    #[test]
    fn a_hidden_capability_is_all_that_goes(offsets in any_offsets(), which: prop::sample::Index) {
        let mut config = chain(&offsets);
        let mut left = walk(&config);
        let hidden = which.index(offsets.len());
        prop_assert!(left.remove(hidden).is_ok());
        prop_assert_eq!(hide_capability(&mut config, offsets[hidden]), Ok(()));
        prop_assert_eq!(walk(&config), left);
    }

    #[test]
    fn a_hidden_extended_capability_is_all_that_goes(
        offsets in any_extended_offsets(),
        which: prop::sample::Index,
    ) {
        let mut config = extended_chain(&offsets);
        let mut left = walk_extended(&config);
        let hidden = which.index(offsets.len());
        prop_assert!(left.remove(hidden).is_ok());
        prop_assert_eq!(hide_extended_capability(&mut config, offsets[hidden]), Ok(()));

        let mut found = walk_extended(&config);
        found.retain(|item| !matches!(item, Ok((ExtendedCapability::NULL, 0x100))));
        prop_assert_eq!(found, left);
    }

    #[test]
    fn walks_over_noise_end(noise in vec(any::<u8>(), 512)) {
        let mut config = ConfigSpace::new();
        config.set(0, &noise.repeat(8));
        config.set(header::STATUS, &[0xff; 2]);
        let found = walk(&config);
        prop_assert!(found.iter().filter(|item| item.is_ok()).count() <= 48);
        prop_assert!(found.iter().rev().skip(1).all(Result::is_ok));
        let found = walk_extended(&config);
        prop_assert!(found.iter().filter(|item| item.is_ok()).count() <= 960);
        prop_assert!(found.iter().rev().skip(1).all(Result::is_ok));
    }
}

#[test]
fn without_the_status_bit_there_is_no_list() {
    let mut config = chain(&[0x40]);
    config.set(header::STATUS, &[0; 2]);
    assert_eq!(walk(&config), []);
}

#[test]
fn a_loop_ends_the_walk() {
    let mut config = chain(&[0x40, 0x50, 0x60]);
    config.set(0x61, &[0x50]);
    let looped = CapabilityError::Loop {
        from: 0x60,
        to: 0x50,
    };
    assert_eq!(
        walk(&config),
        [Ok((1, 0x40)), Ok((2, 0x50)), Ok((3, 0x60)), Err(looped)]
    );
    assert_eq!(hide_capability(&mut config, 0xf0), Err(looped));

    let mut config = extended_chain(&[0x100, 0x200]);
    config.set(0x200, &0x1002_0002u32.to_le_bytes());
    let looped = CapabilityError::Loop {
        from: 0x200,
        to: 0x100,
    };
    assert_eq!(walk_extended(&config)[2..], [Err(looped)]);
}

#[test]
fn a_pointer_out_of_the_list_s_space_ends_the_walk() {
    let outside = CapabilityError::Outside {
        from: 0x40,
        to: 0x04,
    };
    assert_eq!(walk(&chain(&[0x40, 0x04])), [Ok((1, 0x40)), Err(outside)]);

    let mut config = extended_chain(&[0x100]);
    config.set(0x100, &0x0401_0001u32.to_le_bytes());
    let outside = CapabilityError::Outside {
        from: 0x100,
        to: 0x40,
    };
    assert_eq!(walk_extended(&config), [Ok((1, 0x100)), Err(outside)]);
}

#[test]
fn the_low_bits_of_a_pointer_are_ignored() {
    let mut config = chain(&[0x40, 0x50]);
    config.set(header::CAPABILITIES, &[0x43]);
    config.set(0x41, &[0x52]);
    assert_eq!(walk(&config), [Ok((1, 0x40)), Ok((2, 0x50))]);

    let mut config = extended_chain(&[0x100, 0x200]);
    config.set(0x100, &0x2031_0001u32.to_le_bytes());
    assert_eq!(walk_extended(&config), [Ok((1, 0x100)), Ok((2, 0x200))]);
}

#[test]
fn a_device_that_is_gone_has_no_list() {
    let gone: Vec<_> = capabilities(|_| u32::MAX).collect();
    assert_eq!(gone, [Err(CapabilityError::NoAnswer { offset: 0xfc })]);
    assert_eq!(extended_capabilities(|_| u32::MAX).count(), 0);
}

#[test]
fn what_is_not_in_the_list_cannot_be_hidden() {
    let not_found = Err(CapabilityError::NotFound { offset: 0x60 });
    assert_eq!(hide_capability(&mut chain(&[0x40]), 0x60), not_found);
    let not_found = Err(CapabilityError::NotFound { offset: 0x200 });
    assert_eq!(
        hide_extended_capability(&mut extended_chain(&[0x100]), 0x200),
        not_found
    );
}

#[test]
fn the_first_extended_capability_becomes_null() {
    let mut config = extended_chain(&[0x100, 0x200]);
    hide_extended_capability(&mut config, 0x100).unwrap();
    assert_eq!(config.dword(0x100), 0x2000_0000);

    let mut config = extended_chain(&[0x100]);
    hide_extended_capability(&mut config, 0x100).unwrap();
    assert_eq!(walk_extended(&config), []);
}

/// A PCI Express capability at `offset` with this PCI Express Capabilities register, and all-ones from there on.
fn express(offset: u16, capabilities: u16) -> ConfigSpace {
    let mut config = ConfigSpace::new();
    config.set(offset, &[0xff; 0x40]);
    config.set_writable(offset, &[0xff; 0x40]);
    config.set(offset + 2, &capabilities.to_le_bytes());
    config
}

#[test]
fn an_integrated_endpoint_has_no_link() {
    for (capabilities, integrated) in [(0x0002, 0x0092), (0x3e12, 0x3e92)] {
        let mut config = express(0x60, capabilities);
        make_integrated_endpoint(&mut config, 0x60);
        config.write(0x60 + 0x0c, &[0xff; 8]);
        assert_eq!(config.word(0x62), integrated);
        for register in (0x04..0x40).step_by(4) {
            let link = matches!(register, 0x0c | 0x10 | 0x2c | 0x30);
            let expected = if link { 0 } else { u32::MAX };
            assert_eq!(
                config.dword(0x60 + register),
                expected,
                "register {register:#x}"
            );
        }
    }
}

#[test]
fn version_1_has_no_second_set_of_link_registers() {
    let mut config = express(0x60, 0x0001);
    make_integrated_endpoint(&mut config, 0x60);
    assert_eq!(config.word(0x62), 0x0091);
    assert_eq!(config.dword(0x6c), 0);
    assert_eq!(config.dword(0x8c), u32::MAX);
}

#[test]
fn only_endpoints_are_integrated() {
    for port_type in [0x4, 0x5, 0x6, 0x9, 0xa] {
        let mut config = express(0x60, port_type << 4 | 2);
        let before = config.clone();
        make_integrated_endpoint(&mut config, 0x60);
        assert_eq!(config, before);
    }
}

#[test]
fn link_registers_beyond_the_standard_space_are_not_touched() {
    let mut config = express(0xd0, 0x0002);
    make_integrated_endpoint(&mut config, 0xd0);
    assert_eq!(config.dword(0xdc), 0);
    assert_eq!(config.dword(0xfc), u32::MAX);
    assert_eq!(config.dword(0x100), u32::MAX);
}
