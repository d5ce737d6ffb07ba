//! Where a function is in the tree.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::Bdf;

/// Where a function is in its segment's tree: the device and function numbers on the way from the root bus to it, as
/// ACPI's tables name functions. Unlike a [`Bdf`], whose bus number is the guest's to choose once there are
/// bridges, it stays the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u8, u8)>", into = "Vec<(u8, u8)>")]
pub struct TreePath(Vec<(u8, u8)>);

/// A path has at most this many steps: there are no more buses.
const MOST_STEPS: usize = 256;

impl TreePath {
    /// The path to a function on the root bus, which it is wired to.
    pub fn on_root_bus(bdf: Bdf) -> Result<Self, PathError> {
        Self::new(vec![(bdf.device(), bdf.function())])
    }

    /// The path through these devices and functions.
    pub fn new(steps: Vec<(u8, u8)>) -> Result<Self, PathError> {
        if !(1..=MOST_STEPS).contains(&steps.len()) {
            return Err(PathError::Length(steps.len()));
        }
        for &(device, function) in &steps {
            if device > 31 || function > 7 {
                return Err(PathError::Step { device, function });
            }
        }
        Ok(Self(steps))
    }
}

/// Why there can be no such path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PathError {
    /// It is empty, or longer than there are buses.
    #[error("a function {0} steps from the root bus")]
    Length(usize),
    /// There is no such device or function.
    #[error("device {device}, function {function}")]
    Step {
        /// The device's number.
        device: u8,
        /// The function's number.
        function: u8,
    },
}

impl TryFrom<Vec<(u8, u8)>> for TreePath {
    type Error = PathError;

    fn try_from(steps: Vec<(u8, u8)>) -> Result<Self, PathError> {
        Self::new(steps)
    }
}

impl From<TreePath> for Vec<(u8, u8)> {
    fn from(path: TreePath) -> Self {
        path.0
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (device, function)) in self.0.iter().enumerate() {
            let before = if index == 0 { "" } else { "/" };
            write!(f, "{before}{device:02x}.{function:x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_in_a_tree_is_a_path() {
        let path = |steps: &[(u8, u8)]| TreePath::new(steps.to_vec());
        assert_eq!(path(&[(1, 0)]).unwrap().to_string(), "01.0");
        assert_eq!(path(&[(2, 0), (0x1f, 7)]).unwrap().to_string(), "02.0/1f.7");
        assert_eq!(path(&[]), Err(PathError::Length(0)));
        assert_eq!(path(&[(0, 0); 257]), Err(PathError::Length(257)));
        for (device, function) in [(32, 0), (0, 8)] {
            let error = PathError::Step { device, function };
            assert_eq!(path(&[(0, 0), (device, function)]), Err(error));
        }
    }
}
