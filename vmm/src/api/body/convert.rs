//! Between what a VM is to be in a body, and what it is to be.

use super::rest::Rest;
use super::vm::{
    Console, ConsoleMode, Cpus, Device, Disk, Memory, Net, Payload, Platform, UserDevice, VmConfig,
};
use crate::config::{
    DiskConfig, HostDeviceConfig, HostDeviceSource, IommufdConfig, MemoryConfig, NetConfig,
    PayloadConfig, SerialConfig, UserDeviceConfig,
};
use crate::control::ControlError;

/// An empty list is not said at all.
fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// The size of the huge pages that guest RAM can be made of.
const HUGE_PAGE: u64 = 2 << 20;

impl TryFrom<VmConfig> for crate::VmConfig {
    type Error = ControlError;

    /// Every field that cannot be done is named.
    fn try_from(config: VmConfig) -> Result<Self, ControlError> {
        config.check()?;
        let (disks, nets) = (
            config.disks.unwrap_or_default(),
            config.net.unwrap_or_default(),
        );
        let devices = config.devices.unwrap_or_default();
        let user_devices = config.user_devices.unwrap_or_default();
        let id =
            |id: Option<String>, kind: &str, place| id.unwrap_or_else(|| format!("{kind}{place}"));
        Ok(Self {
            payload: PayloadConfig {
                kernel: config.payload.kernel.into(),
                initramfs: config.payload.initramfs.map(Into::into),
                cmdline: config.payload.cmdline.unwrap_or_default(),
            },
            vcpus: config.cpus.boot_vcpus,
            nested: config.cpus.nested,
            memory: MemoryConfig {
                size: config.memory.size,
                hugepages: config.memory.hugepages,
                prefault: config.memory.prefault,
            },
            serial: serial(config.serial)?,
            disks: (disks.into_iter().enumerate())
                .map(|(place, disk)| DiskConfig {
                    id: id(disk.id, "disk", place),
                    path: disk.path.into(),
                    readonly: disk.readonly,
                    direct: disk.direct,
                    num_queues: disk.num_queues,
                    queue_size: disk.queue_size,
                    serial: disk.serial,
                })
                .collect(),
            nets: (nets.into_iter().enumerate())
                .map(|(place, net)| {
                    let mac = net.mac.map(|mac| mac.parse()).transpose();
                    let mac =
                        mac.map_err(|error| invalid(&format!("net[{place}].mac: {error}")))?;
                    Ok(NetConfig {
                        id: id(net.id, "net", place),
                        tap: net.tap,
                        mac,
                        mtu: net.mtu,
                        num_queues: net.num_queues,
                        queue_size: net.queue_size,
                    })
                })
                .collect::<Result<_, _>>()?,
            devices: (devices.into_iter().enumerate())
                .map(|(place, device)| {
                    let missing = || invalid(&format!("devices[{place}].path is missing"));
                    Ok(HostDeviceConfig {
                        id: id(device.id, "device", place),
                        source: HostDeviceSource::Path(device.path.ok_or_else(missing)?),
                        rom: device.rom,
                    })
                })
                .collect::<Result<_, _>>()?,
            iommufd: match config.platform {
                Some(Platform { iommufd: true, .. }) => IommufdConfig::On,
                _ => IommufdConfig::Auto,
            },
            user_devices: (user_devices.into_iter().enumerate())
                .map(|(place, device)| UserDeviceConfig {
                    id: id(device.id, "user-device", place),
                    socket: device.socket.into(),
                })
                .collect(),
        })
    }
}

impl VmConfig {
    fn check(&self) -> Result<(), ControlError> {
        let mut wrong = Vec::new();
        self.rest.refuse("", &mut wrong);
        self.payload.rest.refuse("payload", &mut wrong);
        self.cpus.rest.refuse("cpus", &mut wrong);
        self.memory.rest.refuse("memory", &mut wrong);
        self.serial.rest.refuse("serial", &mut wrong);
        self.console.rest.refuse("console", &mut wrong);
        if let Some(platform) = &self.platform {
            platform.rest.refuse("platform", &mut wrong);
        }
        refuse_each("disks", &self.disks, |disk| &disk.rest, &mut wrong);
        refuse_each("net", &self.net, |net| &net.rest, &mut wrong);
        refuse_each("devices", &self.devices, |device| &device.rest, &mut wrong);
        refuse_each(
            "user_devices",
            &self.user_devices,
            |device| &device.rest,
            &mut wrong,
        );
        if !wrong.is_empty() {
            return Err(invalid(&format!("not possible here: {}", wrong.join(", "))));
        }
        if self.cpus.max_vcpus != self.cpus.boot_vcpus {
            return Err(invalid(
                "cpus.max_vcpus: there is no hotplug; it is as many as boot_vcpus",
            ));
        }
        if self
            .memory
            .hugepage_size
            .is_some_and(|size| size != HUGE_PAGE)
        {
            return Err(invalid(
                "memory.hugepage_size: huge pages are of 2 MiB (2097152)",
            ));
        }
        if !matches!(self.console.mode, ConsoleMode::Off | ConsoleMode::Null) {
            return Err(invalid(
                "console.mode: there is only the serial port, so it is Off or Null",
            ));
        }
        Ok(())
    }
}

fn refuse_each<T>(
    name: &str,
    objects: &Option<Vec<T>>,
    rest: impl Fn(&T) -> &Rest,
    wrong: &mut Vec<String>,
) {
    for (place, object) in objects.iter().flatten().enumerate() {
        rest(object).refuse(&format!("{name}[{place}]"), wrong);
    }
}

fn serial(console: Console) -> Result<SerialConfig, ControlError> {
    match (console.mode, console.file, console.socket) {
        (ConsoleMode::Off | ConsoleMode::Null, _, _) => Ok(SerialConfig::Off),
        (ConsoleMode::Tty, _, _) => Ok(SerialConfig::Tty),
        (ConsoleMode::File, Some(path), _) => Ok(SerialConfig::File(path.into())),
        (ConsoleMode::Socket, _, Some(path)) => Ok(SerialConfig::Socket(path.into())),
        (ConsoleMode::File, None, _) => Err(invalid("serial.file is missing")),
        (ConsoleMode::Socket, _, None) => Err(invalid("serial.socket is missing")),
    }
}

fn invalid(what: &str) -> ControlError {
    ControlError::Invalid(what.to_owned())
}

impl From<&crate::VmConfig> for VmConfig {
    fn from(config: &crate::VmConfig) -> Self {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let disks = config.disks.iter().map(|disk| Disk {
            id: Some(disk.id.clone()),
            path: text(&disk.path),
            readonly: disk.readonly,
            direct: disk.direct,
            num_queues: disk.num_queues,
            queue_size: disk.queue_size,
            serial: disk.serial.clone(),
            rest: Rest::default(),
        });
        let nets = config.nets.iter().map(|net| Net {
            id: Some(net.id.clone()),
            tap: net.tap.clone(),
            mac: net.mac.map(|mac| mac.to_string()),
            mtu: net.mtu,
            num_queues: net.num_queues,
            queue_size: net.queue_size,
            rest: Rest::default(),
        });
        let devices = config.devices.iter().map(|device| Device {
            id: Some(device.id.clone()),
            path: match &device.source {
                HostDeviceSource::Path(path) => Some(path.clone()),
                HostDeviceSource::Descriptor(_) => None,
            },
            rom: device.rom,
            rest: Rest::default(),
        });
        let user_devices = config.user_devices.iter().map(|device| UserDevice {
            id: Some(device.id.clone()),
            socket: text(&device.socket),
            rest: Rest::default(),
        });
        let (mode, file, socket) = match &config.serial {
            SerialConfig::Off => (ConsoleMode::Off, None, None),
            SerialConfig::Tty => (ConsoleMode::Tty, None, None),
            SerialConfig::File(path) => (ConsoleMode::File, Some(text(path)), None),
            SerialConfig::Socket(path) => (ConsoleMode::Socket, None, Some(text(path))),
        };
        let iommufd = match config.iommufd {
            IommufdConfig::On | IommufdConfig::Descriptor(_) => Some(true),
            IommufdConfig::Off => Some(false),
            IommufdConfig::Auto => None,
        };
        Self {
            payload: Payload {
                kernel: text(&config.payload.kernel),
                initramfs: config.payload.initramfs.as_deref().map(text),
                cmdline: Some(config.payload.cmdline.clone()),
                rest: Rest::default(),
            },
            cpus: Cpus {
                boot_vcpus: config.vcpus,
                max_vcpus: config.vcpus,
                nested: config.nested,
                rest: Rest::default(),
            },
            memory: Memory {
                size: config.memory.size,
                hugepages: config.memory.hugepages,
                prefault: config.memory.prefault,
                ..Memory::default()
            },
            disks: some(disks.collect()),
            net: some(nets.collect()),
            devices: some(devices.collect()),
            user_devices: some(user_devices.collect()),
            serial: Console {
                mode,
                file,
                socket,
                rest: Rest::default(),
            },
            console: Console {
                mode: ConsoleMode::Off,
                ..Console::default()
            },
            platform: iommufd.map(|iommufd| Platform {
                iommufd,
                rest: Rest::default(),
            }),
            rest: Rest::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<crate::VmConfig, ControlError> {
        serde_json::from_str::<VmConfig>(text).unwrap().try_into()
    }

    #[test]
    fn bodies_of_cloud_hypervisor_work() {
        // With every field that its own `vm.info` shows of such a VM.
        let config = parse(
            r#"{
            "cpus": {"boot_vcpus": 4, "max_vcpus": 4, "kvm_hyperv": false, "max_phys_bits": 46,
                "features": {"amx": false}, "nested": true, "core_scheduling": "Vm"},
            "memory": {"size": 1073741824, "mergeable": false, "hotplug_method": "Acpi",
                "shared": true, "hugepages": false, "prefault": false, "thp": true},
            "payload": {"kernel": "vmlinux", "cmdline": "console=ttyS0"},
            "disks": [{"path": "focal.raw", "readonly": false, "direct": true, "iommu": false,
                "num_queues": 2, "queue_size": 128, "vhost_user": false, "id": "_disk0",
                "pci_segment": 0, "sparse": true, "image_type": "Raw"}],
            "net": [{"tap": "vm0", "mac": "52:54:00:12:34:56", "host_mac": null, "mtu": 1500,
                "iommu": false, "num_queues": 2, "queue_size": 256, "vhost_user": false,
                "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true,
                "offload_csum": true, "pci_segment": 0}],
            "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0", "iommu": false}],
            "user_devices": [{"socket": "/s", "id": "nvme", "pci_segment": 0}],
            "rng": {"src": "/dev/urandom", "iommu": false},
            "serial": {"mode": "File", "file": "/out", "iommu": false},
            "console": {"mode": "Off", "iommu": false},
            "debug_console": {"mode": "Off", "iobase": null},
            "platform": {"num_pci_segments": 1, "iommufd": true, "vfio_p2p_dma": true,
                "iommu_address_width_bits": 64},
            "balloon": null, "fs": null, "pmem": [], "vdpa": null, "vsock": null, "numa": null,
            "pvpanic": false, "iommu": false, "watchdog": false, "landlock_enable": false
        }"#,
        )
        .unwrap();
        config.validate().unwrap();
        assert_eq!((config.vcpus, config.memory.size), (4, 1 << 30));
        assert_eq!(config.serial, SerialConfig::File("/out".into()));
        assert_eq!(config.iommufd, IommufdConfig::On);
        let ids: Vec<_> = [
            config.disks.iter().map(|disk| disk.id.as_str()).collect(),
            config.nets.iter().map(|net| net.id.as_str()).collect(),
            config
                .devices
                .iter()
                .map(|device| device.id.as_str())
                .collect::<Vec<_>>(),
            config
                .user_devices
                .iter()
                .map(|device| device.id.as_str())
                .collect(),
        ]
        .concat();
        assert_eq!(ids, ["_disk0", "net0", "device0", "nvme"]);
        assert_eq!(config.disks[0].num_queues, Some(2));
        // And what is told of it makes the same again.
        let told = serde_json::to_string(&VmConfig::from(&config)).unwrap();
        assert_eq!(parse(&told).unwrap(), config);
    }

    #[test]
    fn least_body_is_a_kernel() {
        let config = parse(r#"{"payload": {"kernel": "k"}}"#).unwrap();
        assert_eq!((config.vcpus, config.memory.size), (1, 512 << 20));
        assert_eq!(config.serial, SerialConfig::Off);
        for text in [
            "{}",
            r#"{"payload": {}}"#,
            r#"{"payload": {"kernel": 1}}"#,
            r#"{"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": -1, "max_vcpus": 1}}"#,
            r#"{"payload": {"kernel": "k"}, "serial": {"mode": "Pty"}}"#,
            r#"{"payload": {"kernel": "k"}, "disks": [{}]}"#,
        ] {
            assert!(serde_json::from_str::<VmConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (field, named) in [
            (
                r#""cpus": {"boot_vcpus": 1, "max_vcpus": 2}"#,
                "cpus.max_vcpus",
            ),
            (
                r#""memory": {"size": 1, "zones": [{"id": "a"}]}"#,
                "memory.zones",
            ),
            (
                r#""memory": {"size": 1, "hugepage_size": 1073741824}"#,
                "memory.hugepage_size",
            ),
            (
                r#""disks": [{"path": "a"}, {"path": "b", "vhost_user": true, "rate_limit_group": "g"}]"#,
                "disks[1].rate_limit_group, disks[1].vhost_user",
            ),
            (r#""net": [{"ip": "10.0.0.1"}]"#, "net[0].ip"),
            (r#""net": [{"mac": "x"}]"#, "net[0].mac"),
            (
                r#""devices": [{"path": "p", "iommu": true}]"#,
                "devices[0].iommu",
            ),
            (r#""devices": [{}]"#, "devices[0].path"),
            (r#""serial": {"mode": "File"}"#, "serial.file"),
            (r#""serial": {"mode": "Socket"}"#, "serial.socket"),
            (r#""console": {"mode": "Tty"}"#, "console.mode"),
            (r#""tpm": {"socket": "/t"}"#, "tpm"),
            (r#""payload2": "x""#, "payload2"),
        ] {
            let text = format!(r#"{{"payload": {{"kernel": "k"}}, {field}}}"#);
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
