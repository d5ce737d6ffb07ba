//! Names of device classes.

/// What a class code's highest byte says (PCI Code and ID Assignment Specification), in one word.
pub(super) fn name(class: u32) -> &'static str {
    match class >> 16 {
        0x00 => "unclassified",
        0x01 => "storage",
        0x02 => "network",
        0x03 => "display",
        0x04 => "multimedia",
        0x05 => "memory",
        0x06 => "bridge",
        0x07 => "communication",
        0x08 => "system",
        0x09 => "input",
        0x0a => "docking",
        0x0b => "processor",
        0x0c => "serial-bus",
        0x0d => "wireless",
        0x0e => "intelligent-io",
        0x0f => "satellite",
        0x10 => "encryption",
        0x11 => "signal-processing",
        0x12 => "accelerator",
        0x13 => "instrumentation",
        0x40 => "co-processor",
        _ => "other",
    }
}
