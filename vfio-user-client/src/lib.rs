//! The VMM's end of a vfio-user connection.
