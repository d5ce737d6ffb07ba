//! Every vfio-user message, once, as plain structs, and the negotiation of versions and limits.
