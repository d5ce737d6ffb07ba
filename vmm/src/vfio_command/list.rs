//! `outrigger vfio list`.

use devices::host::{HostDevice, HostError, Sysfs};

use super::class;

/// A line of the table. No cell but the last has a space in it, so that other programs can take a line apart.
type Row = [String; 6];

const HEAD: [&str; 6] = ["DEVICE", "IDS", "CLASS", "GROUP", "DRIVER", "PASSTHROUGH"];

/// The devices, and whether each could be passed through; with the bridges among them, too, if `all` are wanted.
pub(super) fn table(sysfs: &Sysfs, all: bool) -> Result<String, HostError> {
    let mut devices = sysfs.devices()?;
    devices.retain(|device| all || !device.is_bridge());
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(devices.iter().map(|device| row(device, sysfs)));
    Ok(aligned(&rows))
}

fn row(device: &HostDevice, sysfs: &Sysfs) -> Row {
    let ids = device.ids();
    let passthrough = match device.check(sysfs) {
        Ok(_) => "yes".to_owned(),
        Err(not_ready) => format!("no: {}", not_ready.obstacle),
    };
    [
        Some(device.name().to_owned()),
        ids.map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")),
        // A mediated device has a type instead.
        (device.class().map(|class| class::name(class).to_owned())).or_else(|| device.mdev_type()),
        device.group().map(|group| group.number().to_string()),
        device.driver(),
        Some(passthrough),
    ]
    .map(|cell| cell.unwrap_or_else(|| "-".to_owned()))
}

/// The rows as lines, with columns that are as wide as they have to be.
fn aligned(rows: &[Row]) -> String {
    let mut widths = [0; HEAD.len()];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
