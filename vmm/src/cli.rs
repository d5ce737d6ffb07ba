//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{ArgAction, ArgGroup, Parser, Subcommand};
use vmm::control::RestoreRequest;
use vmm::{
    DiskConfig, HostDeviceConfig, IommufdConfig, MemoryConfig, NetConfig, PayloadConfig, Policy,
    SerialConfig, UserDeviceConfig, VmConfig, parse_cpus,
};

use crate::{remote, serve};

/// Boots a guest with KVM whose PCI devices are the host's, or live in other processes.
#[derive(Debug, Parser)]
#[command(name = "outrigger", version, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group(ArgGroup::new("vm").args(["kernel", "restore"])))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// The kernel: a bzImage, or an ELF file with a PVH note. Without one there is no VM, until the API is asked for one
    #[arg(long, value_name = "PATH", required_unless_present_any = ["api_socket", "restore"])]
    kernel: Option<PathBuf>,

    /// Go on with the VM of a snapshot: source_url=file:///PATH, resume=on to have it run at once, prefault=on to take the
    /// host's memory at the start. Of the other flags that describe a VM, it goes with --user-device only
    #[arg(
        long,
        value_name = "source_url=URL,...",
        conflicts_with_all = [
            "initramfs", "cmdline", "cpus", "memory", "serial", "disks", "nets", "devices", "platform"
        ]
    )]
    restore: Option<String>,

    /// The initramfs
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initramfs: Option<PathBuf>,

    /// The kernel's command line
    #[arg(
        long,
        value_name = "STRING",
        default_value = "",
        allow_hyphen_values = true,
        requires = "kernel"
    )]
    cmdline: String,

    /// How many vCPUs: a number, or boot=NUMBER. nested=off behind that keeps from the guest that the host's CPUs could have
    /// it run VMs of its own
    #[arg(long, value_name = "NUMBER", default_value = "1", requires = "kernel")]
    cpus: String,

    /// Guest RAM: size=BYTES (with K, M, G or T behind it; 512M if not given), hugepages=on for huge
    /// pages of 2 MiB, prefault=on to take the host's memory at the start
    #[arg(long, value_name = "size=BYTES,...", requires = "kernel")]
    memory: Option<String>,

    /// Where the serial port leads: tty (Ctrl-A x leaves), off, file=PATH or socket=PATH
    #[arg(long, value_name = "WHERE", default_value = "tty", requires = "kernel")]
    serial: String,

    /// The paravirtual console; there is none, so only off is possible
    #[arg(long, value_name = "off", default_value = "off")]
    console: String,

    /// A disk: path= with a raw image or a block device, readonly=on, direct=on to pass by the host's page cache,
    /// num_queues= and queue_size=, serial= to show the guest, and id=NAME to call it by. Takes several values,
    /// and may be repeated
    #[arg(long = "disk", value_name = "path=PATH,...", num_args = 1.., requires = "kernel")]
    disks: Vec<String>,

    /// A network card on a tap: tap= with the name of one (else one is made, which takes CAP_NET_ADMIN), mac=, mtu=,
    /// num_queues= for those that receive and those that transmit together, queue_size=, and id=NAME to call it by. Takes
    /// several values, and may be repeated
    #[arg(
        long = "net",
        value_name = "tap=NAME,...",
        num_args = 0..,
        default_missing_value = "",
        requires = "kernel"
    )]
    nets: Vec<String>,

    /// A device of the host: path= with its sysfs directory, its PCI address or a mediated device's
    /// UUID, id=NAME to call it by, and rom=on to show its expansion ROM; or fd= with an open VFIO
    /// character device. Takes several values, and may be repeated
    #[arg(long = "device", value_name = "path=DEVICE,...", num_args = 1.., requires = "kernel")]
    devices: Vec<String>,

    /// How the host's devices get at guest memory: iommufd=on|off|auto, or iommufd_fd=N
    #[arg(
        long,
        value_name = "iommufd=HOW",
        default_value = "iommufd=auto",
        requires = "kernel"
    )]
    platform: String,

    /// A device that a vfio-user server provides: socket=PATH, and id=NAME to call it by. With --restore, where the
    /// device of that name is now. Takes several values, and may be repeated
    #[arg(
        long = "user-device",
        value_name = "socket=PATH,...",
        num_args = 1..,
        requires = "vm"
    )]
    user_devices: Vec<String>,

    /// Exit with status 3 when the guest resets, instead of starting it again
    #[arg(long)]
    no_reboot: bool,

    /// Stay when the guest powers off or crashes, for the API to boot it again
    #[arg(long, requires = "api_socket")]
    no_shutdown: bool,

    /// Serve the control API on this Unix socket: PATH, or path=PATH. `outrigger remote` speaks to it
    #[arg(long, value_name = "PATH")]
    api_socket: Option<String>,

    /// Write what happens to a file or a pipe, as a line of JSON each: path=PATH
    #[arg(long, value_name = "path=PATH")]
    event_monitor: Option<String>,

    /// Say more: once for what happens, twice for details, three times for every access
    #[arg(short, global = true, action = ArgAction::Count)]
    verbose: u8,
}

/// What there is to do besides running a guest.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serves a built-in device over vfio-user, for any VMM
    #[command(subcommand)]
    Serve(serve::Device),
    /// Shows the host's devices, gives them to VFIO, and gives them back
    #[command(subcommand)]
    Vfio(Vfio),
    /// Asks something of an outrigger that serves its API
    Remote(remote::Arguments),
}

/// What can be done about the host's devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Vfio {
    /// Shows PCI and mediated devices, and whether each could be passed through or what stands in the way
    List {
        /// Show bridges, too
        #[arg(long)]
        all: bool,
    },
    /// Gives PCI devices to VFIO, and with it to VMs
    Bind {
        /// Their addresses, like 0000:01:00.0 or 01:00.0
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<String>,
        /// Only show what would be written, as commands
        #[arg(long)]
        dry_run: bool,
    },
    /// Gives PCI devices back to their own drivers
    Unbind {
        /// Their addresses, like 0000:01:00.0 or 01:00.0
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<String>,
        /// Only show what would be written, as commands
        #[arg(long)]
        dry_run: bool,
    },
}

impl Cli {
    /// Parses the command line. A mistake has been reported when this returns an exit status.
    pub(crate) fn from_arguments() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            if error.use_stderr() {
                eprintln!("outrigger: {}; see outrigger --help", one_line(&error));
                ExitCode::FAILURE
            } else {
                // If standard output is gone, there is nobody to tell.
                let _ = error.print();
                ExitCode::SUCCESS
            }
        })
    }

    /// Logs to standard error. A server of a VM has that in common with it, and says which it is.
    pub(crate) fn set_up_log(&self) {
        let level = match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            2 => log::LevelFilter::Debug,
            _ => log::LevelFilter::Trace,
        };
        let name = match &self.command {
            Some(Command::Serve(device)) => device.id().map(|id| format!("{id}: ")),
            _ => None,
        };
        let name = name.unwrap_or_default();
        env_logger::Builder::new()
            .filter_level(level)
            .format(move |out, record| {
                use std::io::Write as _;
                writeln!(
                    out,
                    "outrigger: {}: {name}{}",
                    record.level().as_str().to_lowercase(),
                    record.args()
                )
            })
            .init();
    }

    /// What a VMM is to do when a run of its guest ends.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            no_reboot: self.no_reboot,
            no_shutdown: self.no_shutdown,
        }
    }

    /// The socket to serve the API on.
    pub(crate) fn api_socket(&self) -> anyhow::Result<Option<PathBuf>> {
        let path = |text| path_option("--api-socket", text);
        self.api_socket.as_deref().map(path).transpose()
    }

    /// Where events are to be written.
    pub(crate) fn event_monitor(&self) -> anyhow::Result<Option<PathBuf>> {
        let path = |text| path_option("--event-monitor", text);
        self.event_monitor.as_deref().map(path).transpose()
    }

    /// The snapshot that is to be restored, if any.
    pub(crate) fn restore_request(&self) -> anyhow::Result<Option<RestoreRequest>> {
        let Some(text) = &self.restore else {
            return Ok(None);
        };
        let mut request = RestoreRequest::parse(text)?;
        if !request.resume && self.api_socket.is_none() {
            bail!(
                "--restore: the VM would stay paused, and nobody could have it go on; say resume=on, or --api-socket"
            );
        }
        for device in self.user_devices()? {
            request.devices.insert(device.id, device.socket);
        }
        Ok(Some(request))
    }

    fn user_devices(&self) -> anyhow::Result<Vec<UserDeviceConfig>> {
        let devices = self.user_devices.iter().enumerate();
        let parse = |(place, text): (usize, &String)| UserDeviceConfig::parse(text, place);
        Ok(devices.map(parse).collect::<Result<_, _>>()?)
    }

    /// The VM that is asked for, if there is to be one from the start.
    pub(crate) fn vm_config(&self) -> anyhow::Result<Option<VmConfig>> {
        if self.console != "off" {
            bail!(
                "--console: `{}` is not possible, there is only the serial port: use --console off",
                self.console
            );
        }
        let Some(kernel) = &self.kernel else {
            return Ok(None);
        };
        let memory = self
            .memory
            .as_deref()
            .map(MemoryConfig::parse)
            .transpose()?;
        let disks = self.disks.iter().enumerate();
        let nets = self.nets.iter().enumerate();
        let host_devices = self.devices.iter().enumerate();
        let (vcpus, nested) = parse_cpus(&self.cpus)?;
        let config = VmConfig {
            payload: PayloadConfig {
                kernel: kernel.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
            },
            vcpus,
            nested,
            memory: memory.unwrap_or_default(),
            serial: SerialConfig::parse(&self.serial)?,
            disks: disks
                .map(|(place, text)| DiskConfig::parse(text, place))
                .collect::<Result<_, _>>()?,
            nets: nets
                .map(|(place, text)| NetConfig::parse(text, place))
                .collect::<Result<_, _>>()?,
            devices: host_devices
                .map(|(place, text)| HostDeviceConfig::parse(text, place))
                .collect::<Result<_, _>>()?,
            iommufd: IommufdConfig::parse(&self.platform)?,
            user_devices: self.user_devices()?,
        };
        config.validate()?;
        Ok(Some(config))
    }
}

/// `PATH` or `path=PATH`.
pub(crate) fn path_option(flag: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = text.strip_prefix("path=").unwrap_or(text);
    if path.is_empty() {
        bail!("{flag}: a path is needed");
    }
    Ok(path.into())
}

/// What clap says first, without the usage that it adds.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> VmConfig {
        let arguments = ["outrigger", "--kernel", "k"].iter().chain(arguments);
        let cli = Cli::try_parse_from(arguments).unwrap();
        cli.vm_config().unwrap().unwrap()
    }

    #[test]
    fn repeated_flags_and_several_values_are_the_same() {
        let repeated = parse(&["--user-device", "socket=/a", "--user-device", "socket=/b"]);
        let several = parse(&["--user-device", "socket=/a", "socket=/b"]);
        assert_eq!(repeated, several);
        assert_eq!(several.user_devices.len(), 2);
    }

    #[test]
    fn command_lines_of_cloud_hypervisor_work() {
        let config = parse(&[
            "--console",
            "off",
            "--serial",
            "tty",
            "--cmdline",
            "console=ttyS0 root=/dev/vda1 rw",
            "--cpus",
            "boot=4",
            "--memory",
            "size=1024M,shared=on",
            "--disk",
            "path=focal.raw",
            "path=seed.raw,readonly=on",
            "--net",
            "tap=vm0,mac=52:54:00:12:34:56",
            "--net",
        ]);
        let disks: Vec<_> = config.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(disks, ["disk0", "disk1"]);
        let nets: Vec<_> = config.nets.iter().map(|net| net.id.as_str()).collect();
        assert_eq!(nets, ["net0", "net1"]);
        assert_eq!((config.vcpus, config.memory.size), (4, 1 << 30));
        assert_eq!(config.serial, SerialConfig::Tty);
    }

    #[test]
    fn vm_is_left_to_the_api() {
        let parse = |arguments: &[&str]| {
            let arguments = ["outrigger"].iter().chain(arguments);
            Cli::try_parse_from(arguments)
        };
        for socket in ["/s", "path=/s"] {
            let cli = parse(&["--api-socket", socket]).unwrap();
            assert_eq!(cli.vm_config().unwrap(), None);
            assert_eq!(cli.api_socket().unwrap(), Some("/s".into()));
        }
        assert!(
            parse(&["--api-socket", "path="])
                .unwrap()
                .api_socket()
                .is_err()
        );
        // What is said of a VM that is not there would be lost.
        assert!(parse(&["--api-socket", "/s", "--disk", "path=d"]).is_err());
        assert!(parse(&["--api-socket", "/s", "--cpus", "2"]).is_err());
        assert!(parse(&["--event-monitor", "path=/e"]).is_err());
        assert!(parse(&["--kernel", "k", "--no-shutdown"]).is_err());
    }

    #[test]
    fn snapshots_say_what_the_vm_is() {
        let parse = |arguments: &[&str]| {
            let arguments = ["outrigger", "--restore"].iter().chain(arguments);
            Cli::try_parse_from(arguments)
        };
        let url = "source_url=file:///s";
        let resumed = "source_url=file:///s,resume=on";
        let cli = parse(&[resumed, "--user-device", "id=a,socket=/a", "socket=/b"]).unwrap();
        assert_eq!(cli.vm_config().unwrap(), None);
        let request = cli.restore_request().unwrap().unwrap();
        let places: Vec<_> = request.devices.into_iter().collect();
        let expected = [("a", "/a"), ("user-device1", "/b")];
        assert_eq!(
            places,
            expected.map(|(id, place)| (id.into(), place.into()))
        );
        assert!(parse(&[url]).unwrap().restore_request().is_err());
        let with_api = parse(&[url, "--api-socket", "/s"]).unwrap();
        assert!(with_api.restore_request().unwrap().is_some());
        for flag in [["--kernel", "k"], ["--disk", "path=d"], ["--cpus", "2"]] {
            assert!(
                parse(&[&[resumed], flag.as_slice()].concat()).is_err(),
                "{flag:?}"
            );
        }
    }

    #[test]
    fn help_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
