//! The backend that is the kernel's VFIO, without a VM around it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use devices::Irq;
use devices::host::Sysfs;
use devices::kernel::{AddressSpace, Iommufd, KernelDevice, KernelError, KvmFiles, Type1};
use pci::BarIndex;
use tests::backend_contract::{self, Subject};
use tests::lab::{Case, HostDevice, Mtty};
use tests::migration_contract::{self, Subject as Migrating};

const EDU: &str = "0000:01:00.0";

/// A way to get at a device.
type Way = fn(Arc<dyn KvmFiles>) -> Result<Box<dyn AddressSpace>, KernelError>;

/// A real device keeps the contract of backends, and can be had again afterwards.
pub(crate) fn contract(_: &mut Case<'_>) -> Result<()> {
    check(&[by_group])
}

/// The same by iommufd, after others have had it by its group, and the other way round.
pub(crate) fn contract_by_iommufd(_: &mut Case<'_>) -> Result<()> {
    check(&[by_group, by_iommufd])
}

/// The state of a device whose driver in the kernel can migrate it is taken out and put into another one.
pub(crate) fn migration(_: &mut Case<'_>) -> Result<()> {
    check_migration(by_group)
}

/// The same by iommufd.
pub(crate) fn migration_by_iommufd(_: &mut Case<'_>) -> Result<()> {
    check_migration(by_iommufd)
}

fn check_migration(way: Way) -> Result<()> {
    const NAMES: [&str; 2] = [
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1004",
    ];
    let _mttys = [Mtty::create(NAMES[0])?, Mtty::create(NAMES[1])?];
    let kvm = Arc::new(Kvm::default());
    let space = way(kvm)?;
    let open = |name: &str| -> Result<KernelDevice> {
        let sysfs = Sysfs::default();
        let found = sysfs.find(name)?;
        let opened = space.open(name, &found.check(&sysfs)?)?;
        Ok(KernelDevice::new(name, opened, None)?)
    };
    let [from, to] = [open(NAMES[0])?, open(NAMES[1])?];
    // The scratch register of the serial port, which a reset of the mediated device leaves as it is.
    let subject = Migrating {
        register: (BarIndex::ALL[0], 7, 1),
        value: [0x5a, 0, 0, 0],
        is_reset: false,
        notices_garbage: false,
    };
    migration_contract::check(&from, &to, &subject)?;
    migration_contract::check(&to, &from, &subject).context("and back")
}

fn by_group(kvm: Arc<dyn KvmFiles>) -> Result<Box<dyn AddressSpace>, KernelError> {
    Ok(Box::new(Type1::new(kvm)?))
}

fn by_iommufd(kvm: Arc<dyn KvmFiles>) -> Result<Box<dyn AddressSpace>, KernelError> {
    Ok(Box::new(Iommufd::new(kvm)?))
}

/// Puts a device to the test twice in each of these ways, while it cannot be had in any other.
fn check(ways: &[Way]) -> Result<()> {
    const BAR0: BarIndex = BarIndex::ALL[0];
    let host = HostDevice::at(EDU)?;
    host.bind("vfio-pci")?;
    let sysfs = Sysfs::default();
    let found = sysfs.find(EDU)?;
    let ready = found.check(&sysfs)?;
    let subject = Subject {
        ids: [0x34, 0x12, 0xe8, 0x11],
        sizes: [1 << 20, 0, 0, 0, 0, 0],
        // It reads as the inverse of what was written, also after a reset.
        register: (BAR0, 4),
        value: (0x1234_5678, !0x1234_5678),
        initial: None,
        raise: (Irq::Msi, BAR0, 0x60, 1),
        calm: Some((BAR0, 0x64, 1)),
        control: (0, 0),
        vectors: [1, 1, 0],
    };
    let kvm = Arc::new(Kvm::default());
    for way in [ways, ways].concat() {
        let space = way(kvm.clone())?;
        let opened = space.open(EDU, &ready)?;
        for other in ways {
            let refused = other(kvm.clone())?.open(EDU, &ready).err();
            let refused = refused.context("it was opened twice")?.to_string();
            ensure!(refused.contains("in use"), "{refused}");
        }
        let device = KernelDevice::new("edu", opened, found.ids())?;
        backend_contract::check(&device, &subject)?;
        drop(device);
        let known = kvm.0.load(Ordering::Relaxed);
        ensure!(known == 0, "KVM still knows {known} files");
    }
    Ok(())
}

/// How many files KVM would know.
#[derive(Debug, Default)]
struct Kvm(AtomicUsize);

impl KvmFiles for Kvm {
    fn add(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn remove(&self, _: BorrowedFd<'_>) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
