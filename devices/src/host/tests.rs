//! The host's devices, on trees that look like a host's.

use super::fake::Fake;
use super::*;

const GPU: &str = "0000:01:00.0";
const SOUND: &str = "0000:01:00.1";
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

/// A graphics card, as an example.
fn card<'a>(host: &'a Fake, name: &str) -> fake::FakeDevice<'a> {
    host.pci(name, (0x10de, 0x1b80), 0x030000)
}

fn sysfs(host: &Fake) -> Sysfs {
    Sysfs::at(host.root())
}

fn obstacle(host: &Fake, name: &str) -> Obstacle {
    let sysfs = sysfs(host);
    let not_ready = sysfs.find(name).unwrap().check(&sysfs).unwrap_err();
    // Whatever it is, the user is told of which device and what to do.
    let text = not_ready.to_string();
    assert!(text.starts_with(name), "{text}");
    let remedy = not_ready.obstacle.remedy(name);
    assert!(!remedy.is_empty() && text.ends_with(&remedy), "{text}");
    not_ready.obstacle
}

#[test]
fn a_device_is_found_by_every_form_of_its_name() {
    let host = Fake::new();
    card(&host, GPU);
    host.mdev(UUID);
    let found = |text: &str| sysfs(&host).find(text).unwrap();
    let path = |path: &str| host.root().join(path).to_str().unwrap().to_owned();
    for text in [
        GPU.to_owned(),
        "01:00.0".to_owned(),
        path("sys/bus/pci/devices/0000:01:00.0"),
        path("sys/bus/pci/devices/0000:01:00.0/"),
        path("sys/bus/pci/devices/../devices/0000:01:00.0//"),
        path("sys/devices/pci0000:00/0000:00:1c.0/0000:01:00.0"),
    ] {
        let device = found(&text);
        assert_eq!((device.kind(), device.name()), (Kind::Pci, GPU), "{text}");
        assert!(device.directory().is_absolute());
        assert!(device.directory().ends_with("0000:00:1c.0/0000:01:00.0"));
    }
    for text in [
        UUID.to_owned(),
        UUID.to_uppercase(),
        path(&format!("sys/bus/mdev/devices/{UUID}/")),
        path(&format!("sys/devices/virtual/mtty/mtty/{UUID}")),
    ] {
        let device = found(&text);
        assert_eq!((device.kind(), device.name()), (Kind::Mdev, UUID), "{text}");
    }
}

#[test]
fn every_wrong_name_is_told_why() {
    let host = Fake::new();
    card(&host, GPU).driver("nouveau");
    let error = |text: &str| sysfs(&host).find(text).unwrap_err();
    let path = |path: &str| host.root().join(path).to_str().unwrap().to_owned();
    let form = error("gpu").to_string();
    assert!(form.contains("`gpu`") && form.contains("01:00.0"), "{form}");
    let missing = error("02:00.0").to_string();
    assert!(missing.contains("0000:02:00.0") && missing.contains("vfio list"));
    assert!(error(UUID).to_string().contains(UUID));
    let nowhere = error(&path("sys/bus/pci/devices/0000:09:00.0"));
    assert!(matches!(nowhere, HostError::NoSuchPath(_)), "{nowhere}");
    for other in [
        "sys/bus/pci/devices",
        "sys/bus/pci/devices/0000:01:00.0/class",
        "sys/bus/pci/devices/0000:01:00.0/driver",
        "dev/vfio/vfio",
    ] {
        let error = error(&path(other));
        assert!(matches!(error, HostError::NotADevice(_)), "{other}");
        assert!(error.to_string().contains(other), "{error}");
    }
    // A directory elsewhere that claims to be a device is none.
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/sys/bus/pci", outside.path().join("subsystem")).unwrap();
    let outside = error(outside.path().to_str().unwrap());
    assert!(matches!(outside, HostError::NotADevice(_)), "{outside}");
}

#[test]
fn sysfs_says_what_a_device_is() {
    let host = Fake::new();
    card(&host, GPU)
        .group(7)
        .driver("nouveau")
        .file("driver_override", "vfio-pci\n")
        .file("sriov_numvfs", "2\n");
    card(&host, SOUND).group(7);
    host.mdev(UUID);
    let device = sysfs(&host).find(GPU).unwrap();
    assert_eq!(device.ids(), Some((0x10de, 0x1b80)));
    assert_eq!(device.class(), Some(0x030000));
    assert_eq!(device.driver().as_deref(), Some("nouveau"));
    assert_eq!(device.driver_override().as_deref(), Some("vfio-pci"));
    assert_eq!(device.virtual_functions(), 2);
    assert!(!device.is_bridge() && !device.is_with_vfio());
    let group = device.group().unwrap();
    assert_eq!((group.number(), group.name()), (7, None));
    let names: Vec<_> = group.members().into_iter().map(|it| it.name).collect();
    assert_eq!(names, [GPU, SOUND]);
    let other = sysfs(&host).find(SOUND).unwrap();
    assert_eq!((other.driver(), other.driver_override()), (None, None));
    assert_eq!(other.virtual_functions(), 0);
    let mdev = sysfs(&host).find(UUID).unwrap();
    assert_eq!((mdev.ids(), mdev.class()), (None, None));
    assert_eq!(mdev.mdev_type().as_deref(), Some("mtty-1"));
    let all = sysfs(&host).devices().unwrap();
    assert_eq!(all, [device, other, mdev]);
}

#[test]
fn nonsense_in_sysfs_is_nothing() {
    let host = Fake::new();
    card(&host, GPU)
        .file("vendor", "0xfffff\n")
        .file("class", "many\n")
        .file("sriov_numvfs", "-1\n")
        .vfio_dev("vfio0", Some("511"));
    let device = sysfs(&host).find(GPU).unwrap();
    assert_eq!((device.ids(), device.class()), (None, None));
    assert_eq!(device.virtual_functions(), 0);
    assert_eq!(device.device_node(&sysfs(&host)), None);
}

#[test]
fn a_host_without_pci_has_no_devices() {
    let host = Fake::new();
    host.remove("sys/bus");
    assert_eq!(sysfs(&host).devices().unwrap(), []);
}

#[test]
fn a_device_with_vfio_is_ready() {
    let host = Fake::new();
    card(&host, GPU).group(7).driver("vfio-pci");
    host.write("dev/vfio/7", "");
    let sysfs = sysfs(&host);
    let ready = sysfs.find(GPU).unwrap().check(&sysfs).unwrap();
    let path = host.root().join("dev/vfio/7");
    let group = Some(GroupNode { number: 7, path });
    let device = None;
    assert_eq!(ready, Ready { group, device });
}

#[test]
fn other_drivers_have_vfio_too() {
    let host = Fake::new();
    host.write("dev/vfio/7", "");
    host.write("dev/vfio/8", "");
    card(&host, GPU).group(7).driver("mlx5_vfio_pci");
    host.mdev(UUID)
        .group_of_vfio(8)
        .driver("intel_vgpu_mdev")
        .vfio_dev("vfio3", None);
    let sysfs = sysfs(&host);
    for name in [GPU, UUID] {
        let ready = sysfs.find(name).unwrap().check(&sysfs).unwrap();
        assert!(ready.group.is_some() && ready.device.is_none());
    }
}

#[test]
fn a_device_can_be_opened_without_its_group() {
    let host = Fake::new();
    card(&host, GPU)
        .group(7)
        .driver("vfio-pci")
        .vfio_dev("vfio3", Some("511:3"));
    host.remove("dev/vfio/vfio");
    let node = host.root().join("dev/vfio/devices/vfio3");
    assert_eq!(
        obstacle(&host, GPU),
        Obstacle::NoNode(host.root().join("dev/iommu"))
    );
    host.write("dev/iommu", "");
    assert_eq!(obstacle(&host, GPU), Obstacle::NoNode(node.clone()));
    host.write("dev/vfio/devices/vfio3", "");
    let sysfs = sysfs(&host);
    let ready = sysfs.find(GPU).unwrap().check(&sysfs).unwrap();
    let device = Some(DeviceNode {
        path: node,
        number: (511, 3),
    });
    let group = None;
    assert_eq!(ready, Ready { group, device });
}

#[test]
fn without_an_iommu_nothing_is_passed_through() {
    let host = Fake::new();
    card(&host, GPU);
    assert_eq!(obstacle(&host, GPU), Obstacle::NoGroup);
    host.remove("sys/class/iommu");
    assert_eq!(obstacle(&host, GPU), Obstacle::IommuOff);
}

#[test]
fn vfio_without_an_iommu_is_refused() {
    let host = Fake::new();
    card(&host, GPU).group_of_vfio(0).driver("vfio-pci");
    assert_eq!(obstacle(&host, GPU), Obstacle::NoIommuMode);
}

#[test]
fn a_bridge_stays_with_the_host() {
    let host = Fake::new();
    host.pci(GPU, (0x8086, 0xa110), 0x060400)
        .group(7)
        .driver("pcieport");
    assert_eq!(obstacle(&host, GPU), Obstacle::Bridge);
}

#[test]
fn a_device_that_vfio_does_not_have_is_to_be_bound() {
    let host = Fake::new();
    card(&host, GPU).group(7).driver("nouveau");
    card(&host, SOUND).group(7);
    let driver = obstacle(&host, GPU);
    assert_eq!(driver, Obstacle::HostDriver("nouveau".to_owned()));
    assert!(driver.remedy(GPU).contains("vfio bind 0000:01:00.0"));
    assert_eq!(obstacle(&host, SOUND), Obstacle::NoDriver);
    host.mdev(UUID).group_of_vfio(8);
    assert_eq!(obstacle(&host, UUID), Obstacle::MdevDriver);
}

#[test]
fn the_rest_of_the_group_matters() {
    let host = Fake::new();
    host.write("dev/vfio/7", "");
    card(&host, GPU).group(7).driver("vfio-pci");
    card(&host, "0000:01:00.2").group(7).driver("vfio-pci");
    card(&host, "0000:01:00.3").group(7).driver("pci-stub");
    card(&host, "0000:01:00.4").group(7);
    host.pci("0000:00:1c.0", (0x8086, 0xa110), 0x060400)
        .group(7)
        .driver("pcieport");
    let sysfs = sysfs(&host);
    let device = sysfs.find(GPU).unwrap();
    assert!(device.check(&sysfs).is_ok());

    card(&host, SOUND).group(7).driver("snd_hda_intel");
    let obstacle = obstacle(&host, GPU);
    let said = obstacle.to_string();
    assert!(said.ends_with(": 0000:01:00.1 (snd_hda_intel)"), "{said}");
    assert!(obstacle.remedy(GPU).contains("vfio bind 0000:01:00.1`"));
}

#[test]
fn files_in_dev_are_named() {
    let host = Fake::new();
    card(&host, GPU).group(7).driver("vfio-pci");
    let node = host.root().join("dev/vfio/7");
    assert_eq!(obstacle(&host, GPU), Obstacle::NoNode(node.clone()));
    host.remove("dev/vfio/vfio");
    let container = host.root().join("dev/vfio/vfio");
    assert_eq!(obstacle(&host, GPU), Obstacle::NoNode(container));

    // Root may open everything, so this one is only told.
    let permission = Obstacle::Permission("/dev/vfio/7".into());
    assert!(permission.to_string().contains("/dev/vfio/7"));
    let remedy = permission.remedy(GPU);
    assert!(remedy.contains("chown $USER /dev/vfio/7") && remedy.contains("udev"));
}
