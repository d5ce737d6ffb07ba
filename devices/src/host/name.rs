//! The names of devices, as users write them and as sysfs does.

use super::device::Kind;

/// A device's kind and its name in sysfs, of a PCI address or an mdev's UUID.
pub(super) fn parse(text: &str) -> Option<(Kind, String)> {
    let pci = pci_address(text).map(|name| (Kind::Pci, name));
    pci.or_else(|| Some((Kind::Mdev, uuid(text)?)))
}

/// `01:00.0` or `0000:01:00.0`. A domain has more than four digits behind some storage controllers (VMD).
fn pci_address(text: &str) -> Option<String> {
    let (rest, function) = text.split_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let domain = hex(domain, 4..=8)?;
    let bus = hex(bus, 2..=2)?;
    let device = hex(device, 2..=2).filter(|device| *device < 32)?;
    let function = hex(function, 1..=1).filter(|function| *function < 8)?;
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

/// `83b8f4f2-509f-382f-3c1e-e6bfe0fa1001`, which sysfs has in lower case.
fn uuid(text: &str) -> Option<String> {
    let mut parts = text.split('-');
    for length in [8, 4, 4, 4, 12] {
        let part = parts.next()?;
        if part.len() != length || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
    }
    parts.next().is_none().then(|| text.to_ascii_lowercase())
}

/// A hexadecimal number with so many digits.
fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    // `from_str_radix` would also take a sign.
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || !digits.contains(&text.len()) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_several_forms() {
        for (text, name) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("01:00.0", "0000:01:00.0"),
            ("AF:1F.7", "0000:af:1f.7"),
            ("10000:E1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(parse(text), Some((Kind::Pci, name.into())), "{text}");
        }
        let uuid = "83B8F4F2-509f-382f-3c1e-e6bfe0fa1001";
        assert_eq!(parse(uuid), Some((Kind::Mdev, uuid.to_lowercase())));
    }

    #[test]
    fn anything_else_is_no_name() {
        for text in [
            "",
            ".",
            ":.",
            "eth0",
            "01:00",
            "1:0.0",
            "01:20.0",
            "01:00.8",
            "01:00.0.0",
            "01:00.00",
            "+1:00.0",
            "0000:01:00.0 ",
            "000:01:00.0",
            "0:0000:01:00.0",
            "000000000:01:00.0",
            "é1:00.0",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001-",
            "83b8f4f2509f382f3c1ee6bfe0fa1001",
            "g3b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
