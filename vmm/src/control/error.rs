//! Why a request is refused or has failed.

use super::progress::OperationKind;

/// Why a request is refused or has failed. Nothing has changed then, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no VM to do it with.
    #[error("there is no VM: create one first (vm.create, vm.restore or vm.receive-migration)")]
    NoVm,
    /// There is one already.
    #[error("there is a VM already: delete it first (vm.delete)")]
    HasVm,
    /// The VM is in a state in which this makes no sense.
    #[error("the VM is {is}, and this needs one that is {needed}")]
    State {
        /// What it is.
        is: &'static str,
        /// What it has to be.
        needed: &'static str,
    },
    /// Another operation has not ended.
    #[error("{} is going on: wait for its end, or cancel it (vm.migration)", .0.endpoint())]
    Busy(OperationKind),
    /// It is not known whether the VM runs elsewhere.
    #[error("the VM's migration is in doubt: resolve that first (vm.resolve-migration)")]
    Unresolved,
    /// There has been no operation.
    #[error("there is no operation, and has been none")]
    NoOperation,
    /// The operation was cancelled.
    #[error("{} was cancelled", .0.endpoint())]
    Cancelled(OperationKind),
    /// There is no migration of which it is not known how it ended.
    #[error("no migration is in doubt")]
    NothingInDoubt,
    /// It is not known where the VM runs.
    #[error(
        "the VM stands still here, and {peer} may run it: vm.migration tells when that is known. If {peer} is gone for \
         good, say so (vm.resolve-migration)"
    )]
    InDoubt {
        /// The other VMM.
        peer: &'static str,
        /// What has happened.
        #[source]
        source: pci::Cause,
    },
    /// What is asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// What is asked for is not there yet.
    #[error("{0} is not supported by this version")]
    NotSupported(&'static str),
    /// The VMM is about to end.
    #[error("the VMM is about to end")]
    Ending,
    /// It was tried, and has failed.
    #[error("{what}")]
    Failed {
        /// What has failed.
        what: &'static str,
        /// Why.
        #[source]
        source: pci::Cause,
    },
}

impl ControlError {
    /// A failure of `what`.
    pub(crate) fn failed(what: &'static str, source: impl Into<pci::Cause>) -> Self {
        Self::Failed {
            what,
            source: source.into(),
        }
    }

    /// What it says, from the top to the root cause.
    pub fn messages(&self) -> Vec<String> {
        let causes =
            std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        causes.map(ToString::to_string).collect()
    }
}
