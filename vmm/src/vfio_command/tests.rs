//! The command, on trees that look like a host's. No kernel answers there to what is written.

use std::fs;

use super::fake::{Fake, FakeDevice};
use super::*;

const NET: &str = "0000:01:00.0";
const DISK: &str = "0000:01:00.1";
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

fn net(host: &Fake) -> FakeDevice<'_> {
    host.pci(NET, (0x8086, 0x10d3), 0x020000)
}

fn disk(host: &Fake) -> FakeDevice<'_> {
    host.pci(DISK, (0x1b36, 0x0010), 0x010802)
}

/// What is done to `names`, and what is said; its paths are told as if the host were real.
fn call(
    host: &Fake,
    command: fn(&Sysfs, &[String], bool, &mut dyn io::Write) -> anyhow::Result<()>,
    names: &[&str],
    dry_run: bool,
) -> Result<String, String> {
    let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let mut out = Vec::new();
    let done = command(&Sysfs::at(host.root()), &names, dry_run, &mut out);
    let root = host.root().to_str().unwrap();
    let real = |text: &str| text.replace(root, "");
    match done {
        Ok(()) => Ok(real(std::str::from_utf8(&out).unwrap())),
        Err(error) => Err(real(&format!("{error:#}"))),
    }
}

#[test]
fn the_list_is_a_table() {
    let host = Fake::new();
    host.write("dev/vfio/12", "");
    host.write("dev/vfio/13", "");
    host.pci("0000:00:1c.0", (0x8086, 0xa110), 0x060400)
        .group(5)
        .driver("pcieport");
    net(&host).group(6).driver("e1000e");
    disk(&host).group(12).driver("vfio-pci");
    host.pci("0000:02:00.0", (0x1234, 0x11e8), 0x00ff00)
        .group(6);
    host.mdev(UUID)
        .group_of_vfio(13)
        .driver("mtty")
        .vfio_dev("vfio0", None);
    let sysfs = Sysfs::at(host.root());
    assert_eq!(
        list::table(&sysfs, false).unwrap(),
        "\
DEVICE                                IDS        CLASS         GROUP  DRIVER    PASSTHROUGH
0000:01:00.0                          8086:10d3  network       6      e1000e    no: it is bound to the host's driver e1000e
0000:01:00.1                          1b36:0010  storage       12     vfio-pci  yes
0000:02:00.0                          1234:11e8  unclassified  6      -         no: it is bound to no driver
83b8f4f2-509f-382f-3c1e-e6bfe0fa1001  -          mtty-1        13     mtty      yes
"
    );
    let all = list::table(&sysfs, true).unwrap();
    let bridge = all.lines().nth(1).unwrap();
    let cells: Vec<_> = bridge.split_whitespace().take(5).collect();
    let expected = ["0000:00:1c.0", "8086:a110", "bridge", "5", "pcieport"];
    assert_eq!(cells, expected);
    assert!(bridge.ends_with("no: it is a bridge"));
}

#[test]
fn a_dry_run_shows_what_would_be_written() {
    let host = Fake::new();
    let net = net(&host).group(6).driver("e1000e");
    disk(&host).group(7);
    assert_eq!(
        call(&host, bind::bind, &["01:00.0", DISK, NET], true).unwrap(),
        "\
echo vfio-pci >/sys/bus/pci/devices/0000:01:00.0/driver_override
echo 0000:01:00.0 >/sys/bus/pci/drivers/e1000e/unbind
echo 0000:01:00.0 >/sys/bus/pci/drivers_probe
echo vfio-pci >/sys/bus/pci/devices/0000:01:00.1/driver_override
echo 0000:01:00.1 >/sys/bus/pci/drivers_probe
"
    );
    // Nothing was written.
    let driver_override = fs::read_to_string(net.path("driver_override")).unwrap();
    assert_eq!(driver_override, "(null)\n");

    assert_eq!(
        call(&host, bind::unbind, &[NET], true).unwrap(),
        "# nothing to do\n"
    );
}

#[test]
fn a_dry_run_shows_how_devices_are_given_back() {
    let host = Fake::new();
    net(&host)
        .group(6)
        .driver("vfio-pci")
        .file("driver_override", "vfio-pci\n");
    // Its binding failed half way.
    disk(&host).group(7).file("driver_override", "vfio-pci\n");
    assert_eq!(
        call(&host, bind::unbind, &[NET, DISK], true).unwrap(),
        "\
echo 0000:01:00.0 >/sys/bus/pci/drivers/vfio-pci/unbind
echo >/sys/bus/pci/devices/0000:01:00.0/driver_override
echo 0000:01:00.0 >/sys/bus/pci/drivers_probe
echo >/sys/bus/pci/devices/0000:01:00.1/driver_override
echo 0000:01:00.1 >/sys/bus/pci/drivers_probe
"
    );
    assert_eq!(
        call(&host, bind::bind, &[NET], true).unwrap(),
        "# nothing to do\n"
    );
}

#[test]
fn what_is_shown_is_written() {
    let host = Fake::new();
    let net = net(&host).group(6).driver("e1000e");
    let error = call(&host, bind::bind, &[NET], false).unwrap_err();
    // As no kernel has done anything.
    assert!(
        error.contains("not taken 0000:01:00.0, which is with e1000e"),
        "{error}"
    );
    assert!(error.contains("vfio unbind 0000:01:00.0"), "{error}");
    let written = |path: &str| fs::read_to_string(host.root().join(path)).unwrap();
    assert_eq!(
        written("sys/bus/pci/drivers/e1000e/unbind"),
        "0000:01:00.0\n"
    );
    assert_eq!(written("sys/bus/pci/drivers_probe"), "0000:01:00.0\n");
    let driver_override = fs::read_to_string(net.path("driver_override")).unwrap();
    assert_eq!(driver_override.lines().next(), Some("vfio-pci"));
}

#[test]
fn a_failed_write_is_named() {
    let host = Fake::new();
    net(&host).group(6).driver("e1000e");
    host.remove("sys/bus/pci/drivers_probe");
    let error = call(&host, bind::bind, &[NET], false).unwrap_err();
    for part in [
        "cannot write `0000:01:00.0` to /sys/bus/pci/drivers_probe",
        "half way, and `outrigger vfio unbind 0000:01:00.0`",
        "os error 2",
    ] {
        assert!(error.contains(part), "no `{part}` in: {error}");
    }
}

#[test]
fn a_bound_device_says_what_else_its_group_needs() {
    let host = Fake::new();
    host.write("dev/vfio/6", "");
    net(&host).group(6).driver("vfio-pci");
    let said = call(&host, bind::bind, &[NET], false).unwrap();
    assert_eq!(said, "0000:01:00.0 is with vfio-pci already\n");
    disk(&host).group(6).driver("nvme");
    let said = call(&host, bind::bind, &[NET], false).unwrap();
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("0000:01:00.0 is with vfio-pci already"));
    let needed = lines.next().unwrap();
    assert!(needed.contains("0000:01:00.1 (nvme)"), "{needed}");
    assert!(needed.contains("vfio bind 0000:01:00.1`"), "{needed}");
}

#[test]
fn devices_that_would_be_lost_are_refused_before_any_is_touched() {
    let host = Fake::new();
    let good = net(&host).group(6).driver("e1000e");
    host.pci("0000:00:1c.0", (0x8086, 0xa110), 0x060400)
        .group(5);
    host.pci("0000:03:00.0", (0x8086, 0x10c9), 0x020000)
        .group(8)
        .file("sriov_numvfs", "2\n");
    host.pci("0000:04:00.0", (0x8086, 0x10d3), 0x020000);
    host.mdev(UUID).group_of_vfio(9).driver("mtty");
    for (name, parts) in [
        ("0000:00:1c.0", ["0000:00:1c.0", "bridge"]),
        (
            "0000:03:00.0",
            ["2 virtual functions", "sriov_numvfs first"],
        ),
        ("0000:04:00.0", ["in no IOMMU group", "another slot"]),
        ("0000:05:00.0", ["no PCI device 0000:05:00.0", "vfio list"]),
        (UUID, [UUID, "remove ends it"]),
    ] {
        let error = call(&host, bind::bind, &[NET, name], false).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "no `{part}` in: {error}");
        }
    }
    host.remove("sys/bus/pci/drivers/vfio-pci");
    let error = call(&host, bind::bind, &[NET], false).unwrap_err();
    assert!(error.contains("`modprobe vfio-pci`"), "{error}");
    let driver_override = fs::read_to_string(good.path("driver_override")).unwrap();
    assert_eq!(driver_override, "(null)\n");
}
