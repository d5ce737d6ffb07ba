//! The machine, and the outrigger binary.
