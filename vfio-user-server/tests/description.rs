//! Devices that cannot be.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::io;
use std::sync::Arc;

use support::memfd;
use vfio_user_server::{
    Bar, Description, DescriptionError, Device, Doorbell, Ids, MAX_DOORBELLS, MsixTable, Options,
    Server, ServerError, Window,
};

struct Nothing;

impl Device for Nothing {
    fn read(&mut self, _: usize, _: u64, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn write(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}
}

fn device() -> Description {
    Description::new(Ids {
        vendor: 1,
        device: 2,
        subsystem_vendor: 3,
        subsystem: 4,
        revision: 5,
        class: 6,
    })
}

/// Why a device cannot be; `None` if it can.
fn error(description: Description) -> Option<DescriptionError> {
    let server = Server::new(description, Options::default(), |_| Nothing);
    match server {
        Ok(_) => None,
        Err(ServerError::Description(error)) => Some(error),
        Err(other) => {
            assert!(matches!(other, ServerError::Description(_)), "{other}");
            None
        }
    }
}

#[test]
fn bars_have_the_sizes_that_they_can_have() {
    for (bar, is_possible) in [
        (Bar::io(4), true),
        (Bar::io(256), true),
        (Bar::io(2), false),
        (Bar::io(512), false),
        (Bar::io(24), false),
        (Bar::memory32(16), true),
        (Bar::memory32(8), false),
        (Bar::memory32(0), false),
        (Bar::memory32(0x3000), false),
        (Bar::memory32(1 << 31), true),
        (Bar::memory32(1 << 32), false),
        (Bar::memory64(1 << 40), true),
        (Bar::memory64(1 << 63), false),
    ] {
        let error = error(device().bar(0, bar.clone()));
        let expected = matches!(error, Some(DescriptionError::BarSize { bar: 0, .. }));
        assert_eq!(error.is_none(), is_possible, "{bar:?}");
        assert_eq!(expected, !is_possible, "{bar:?}");
    }
}

#[test]
fn bars_have_registers_of_their_own() {
    let memory = || Bar::memory64(0x1000);
    let six = error(device().bar(6, Bar::io(4)));
    assert_eq!(six, Some(DescriptionError::NoSuchBar(6)));
    let twice = error(device().bar(0, Bar::io(4)).bar(0, Bar::io(4)));
    assert_eq!(twice, Some(DescriptionError::NoSuchBar(0)));
    let last = error(device().bar(5, memory()));
    assert_eq!(last, Some(DescriptionError::UpperHalf(5)));
    let shared = error(device().bar(0, memory()).bar(1, memory()));
    assert_eq!(shared, Some(DescriptionError::UpperHalf(0)));
    assert_eq!(
        error(device().bar(0, memory()).bar(2, memory()).bar(4, memory())),
        None
    );
}

#[test]
fn areas_are_pages_of_the_bar_and_its_file() {
    let file = Arc::new(memfd(0x3000));
    let with = |bar: Bar, areas: &[(u64, u64)]| {
        let areas = areas.iter().map(|(start, end)| *start..*end);
        let bar = areas.fold(bar.backed_by(Arc::clone(&file)), Bar::mappable);
        error(device().bar(0, bar))
    };
    let memory = || Bar::memory32(0x4000);
    assert_eq!(with(memory(), &[(0, 0x1000), (0x2000, 0x3000)]), None);
    let nothing = error(device().bar(0, memory().mappable(0..0x1000)));
    assert!(matches!(nothing, Some(DescriptionError::Area { .. })));
    for (bar, areas) in [
        (memory(), &[(0, 0x1001)][..]),
        (memory(), &[(1, 0x1000)]),
        (memory(), &[(0x1000, 0x1000)]),
        (memory(), &[(0x2000, 0x1000)]),
        (memory(), &[(0, 0x4000)]),
        (memory(), &[(0, 0x2000), (0x1000, 0x3000)]),
        (Bar::io(256), &[(0, 0x1000)]),
    ] {
        let error = with(bar, areas);
        let is_refused = matches!(error, Some(DescriptionError::Area { bar: 0, .. }));
        assert!(is_refused, "{areas:x?}");
    }
}

#[test]
fn the_msix_table_is_in_its_bar() {
    let table = MsixTable {
        vectors: 64,
        table_bar: 0,
        table_offset: 0,
        pending_bar: 0,
        pending_offset: 0x400,
    };
    let with = |table| {
        let mapped = Bar::memory32(0x2000)
            .backed_by(Arc::new(memfd(0x2000)))
            .mappable(0x1000..0x2000);
        error(
            device()
                .bar(0, mapped)
                .bar(1, Bar::memory32(0x1000))
                .msix(table),
        )
    };
    assert_eq!(with(table), None);
    for (wrong, expected) in [
        (
            MsixTable {
                vectors: 0,
                ..table
            },
            DescriptionError::Vectors(0),
        ),
        (
            MsixTable {
                vectors: 2049,
                ..table
            },
            DescriptionError::Vectors(2049),
        ),
        (
            MsixTable {
                vectors: 65,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                table_offset: 4,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                table_bar: 2,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                table_bar: 7,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                table_bar: 1,
                table_offset: 0xc08,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                table_offset: 0x1000,
                ..table
            },
            DescriptionError::Msix,
        ),
        (
            MsixTable {
                pending_offset: 0x1000,
                ..table
            },
            DescriptionError::Msix,
        ),
    ] {
        assert_eq!(with(wrong), Some(expected), "{wrong:?}");
    }
    let msi = |vectors| error(device().msi(vectors));
    assert_eq!([1, 2, 4, 8, 16, 32].map(msi), [const { None }; 6]);
    for vectors in [0, 3, 33, 64] {
        assert_eq!(msi(vectors), Some(DescriptionError::Vectors(vectors)));
    }
}

#[test]
fn doorbells_are_where_nothing_is_mapped() {
    let bell = Doorbell {
        bar: 0,
        offset: 0xffc,
        size: 4,
        value: Some(0xffff_ffff),
    };
    let with = |bells: &[Doorbell]| {
        let mapped = Bar::memory32(0x2000)
            .backed_by(Arc::new(memfd(0x2000)))
            .mappable(0x1000..0x2000);
        error(
            bells
                .iter()
                .copied()
                .fold(device().bar(0, mapped), Description::doorbell),
        )
    };
    assert_eq!(with(&[bell]), None);
    for wrong in [
        Doorbell { bar: 1, ..bell },
        Doorbell { bar: 200, ..bell },
        Doorbell {
            offset: 0xffd,
            ..bell
        },
        Doorbell {
            offset: u64::MAX,
            ..bell
        },
        Doorbell { size: 3, ..bell },
        Doorbell { size: 0, ..bell },
        Doorbell { size: 16, ..bell },
        Doorbell {
            value: Some(1 << 32),
            ..bell
        },
    ] {
        assert_eq!(with(&[wrong]), Some(DescriptionError::Doorbell(wrong)));
    }
    assert_eq!(
        with(&vec![bell; MAX_DOORBELLS + 1]),
        Some(DescriptionError::Doorbells)
    );
}

#[test]
fn a_window_is_in_its_capability() {
    let window = |data| {
        let place = |_: &[u8]| None;
        error(device().window(9, &[0; 18], &[], Window { data, place }))
    };
    let wrong = Some(DescriptionError::Window);
    assert_eq!(
        [window(14), window(15), window(usize::MAX)],
        [None, wrong.clone(), wrong]
    );
}

#[test]
fn capabilities_fit_into_config_space() {
    let fill = |size: usize| error(device().capability(9, &vec![0; size], &[]));
    assert_eq!(
        [fill(0xbe), fill(0xbf)],
        [None, Some(DescriptionError::Capabilities)]
    );
    let many = |count| error((0..count).fold(device(), |device, _| device.power_management()));
    assert_eq!(
        [many(24), many(25)],
        [None, Some(DescriptionError::Capabilities)]
    );
    let extended = error(device().serial_number(1));
    assert_eq!(
        extended,
        Some(DescriptionError::Capabilities),
        "without PCI Express"
    );
    let long = |size: usize| {
        error(
            device()
                .express()
                .extended_capability(9, 1, &vec![0; size], &[]),
        )
    };
    assert_eq!(
        [long(0xefc), long(0xefd)],
        [None, Some(DescriptionError::Capabilities)]
    );
}
