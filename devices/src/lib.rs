//! What the guest sees: the passthrough endpoint, its backends, and the few platform devices.
