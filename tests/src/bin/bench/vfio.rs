//! How long it takes to give a guest a device of the host.

use ::tests::tiny;

use crate::Bench;
use crate::measurement::{Better, Definition};
use crate::programs::{Guest, QEMU};
use crate::start::{self, Smallest};

const ATTACH: Definition = Definition {
    key: "vfio_attach_ms",
    what: "from the start of the process to its guest's first character, with 512 MiB of memory and a device of the host",
    unit: "ms",
    better: Better::Less,
    limit: None,
    aims: &[],
};

pub(crate) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let Some(device) = bench.vfio_device.clone() else {
        bench.report.skipped.push(format!(
            "`{}`: no device that vfio-pci has was given (VFIO_DEVICE=/sys/bus/pci/devices/ADDRESS)",
            ATTACH.key
        ));
        return Ok(());
    };
    let device = device.display();
    let kernel = tiny::guest(|code| {
        code.print(b'x')?;
        code.halt()
    })?;
    let guest = Guest {
        kernel: kernel.path(),
        mebibytes: 512,
        cpus: 1,
        devices: &[],
    };
    let results = start::with_peers(bench, &guest, Smallest::Q35, |name, command| {
        if name == QEMU {
            command.args(["-device", &format!("vfio-pci,sysfsdev={device}")]);
        } else {
            command.args(["--device", &format!("path={device}")]);
        }
    })?;
    bench.add(results.measurement(&ATTACH, |run| run.start));
    bench.failed(ATTACH.key, results.failures);
    Ok(())
}
