//! Virtio devices over PCI, as virtio 1.2 has them (section 4.1, without the legacy interface).
//!
//! # Writing a device
//!
//! A device implements [`VirtioDevice`], which says what it is, and gets its queues when the driver is ready. [`server`]
//! makes a vfio-user server of it. The transport does the rest: the registers, the negotiation of features, interrupts
//! by MSI-X or the wired one, resets, and migration.
//!
//! Queues are served by threads of the device's own, so that neither a notification nor an interrupt passes the thread
//! that serves the client. A [`Worker`] is such a thread: it waits, made once and for all, until it is given queues, and
//! serves them with the device's [`Service`] until it is to give them back.
//!
//! 1. The device makes its workers before it is served, one for all queues or one for each.
//! 2. [`VirtioDevice::activate`] gets the [`VirtQueue`]s that the driver has enabled, and gives them to the workers
//!    ([`Worker::start`]).
//! 3. [`Service::serve`] runs in the worker. It first looks at all queues, as if each had been notified, and then waits
//!    for the [doorbells](VirtQueue::doorbell), for whatever else the device waits for, and for [`Stop`].
//! 4. When it is to stop, it takes no more of what the driver has made available, finishes what it has taken, and
//!    returns. [`VirtioDevice::deactivate`] then gives the queues back ([`Worker::stop`]). They are where they were when
//!    they are given again, here or after a migration.
//!
//! This is how a queue is served, without losing a notification whatever the driver does meanwhile:
//!
//! ```ignore
//! queue.doorbell().has_rung(); // Taken before the queue is looked at.
//! let guest = queue.guest();
//! loop {
//!     queue.disable_notifications(&guest.view);
//!     while let Some(chain) = queue.pop(&guest.view) {
//!         let head = chain.head_index();
//!         let written = /* … */;
//!         queue.push(&guest.view, head, written);
//!     }
//!     queue.interrupt(&guest.view);
//!     if !queue.enable_notifications(&guest.view) {
//!         break;
//!     }
//! }
//! ```
//!
//! The view of [`Guest`](guest::Guest) memory is for one batch: memory that the client unmaps stays mapped, and the client waits, until there is no view of
//! it. A request that takes time keeps a clone, and gives its result through that one. A service that waits has none.
//!
//! # Who is trusted
//!
//! Nobody: what is in the queues is the guest's. If a queue is outside guest memory when the driver says that it is ready,
//! or later has more buffers than it has room for, the device says that it needs a reset, and the queue yields nothing.
//! It yields nothing either while its memory is not mapped, or the device not bus master. A chain has no more
//! descriptors than its table, but what they say is for the device to check: chains may be cut off where they are wrong,
//! and addresses may be anywhere. The queues themselves have to be in memory that the client shares; buffers may be in
//! memory that is reached by messages alone, by [`Memory::read`](vfio_user_server::Memory::read) and
//! [`write`](vfio_user_server::Memory::write).
//!
//! # What it looks like
//!
//! | BAR 0, from | is | section |
//! |---|---|---|
//! | 0x0000 | common configuration | 4.1.4.3 |
//! | 0x1000 | ISR status | 4.1.4.5 |
//! | 0x2000 | the device's own configuration | 4.1.4.6 |
//! | 0x3000 | notifications: 4 bytes for each queue, each a doorbell | 4.1.4.4 |
//! | 0x4000 | MSI-X table: the first vector after a reset is nobody's; the driver says whose each is | |
//! | 0x6000 | MSI-X pending bits | |
//!
//! There is one vector more than there are queues. All of it can be accessed by configuration space, too, which is for
//! firmware that cannot map memory (`VIRTIO_PCI_CAP_PCI_CFG`, 4.1.4.9).

mod common;
mod device;
pub mod guest;
mod layout;
mod queue;
mod signals;
mod state;
mod transport;
mod worker;

pub use self::device::{Activation, Identity, VirtioDevice};
pub use self::layout::MAX_QUEUES;
pub use self::queue::{Chain, VirtQueue};
pub use self::signals::ConfigSignal;
pub use self::transport::{Transport, server};
pub use self::worker::{Service, Stop, Worker};
