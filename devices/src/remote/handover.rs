//! A device behind a vfio-user connection goes to another process with its connection.

use std::sync::Arc;
use std::time::Duration;

use vfio_user_client::{
    Client, Descriptors, GuestDma, MigrationFlags, Options, Setup, Standing, State,
};

use super::Remote;
use super::migration::RemoteMigration;
use crate::backend::BackendError;
use crate::handover::{Handover, RemoteState};
use crate::migration::Migration as _;

impl Remote {
    /// A device that another process has, and may hand over. `memory` is what it may then reach by messages. It is away
    /// until it is [taken over](Handover::take_over) and [goes on](Handover::go_on).
    pub fn inherit(
        state: &RemoteState,
        descriptors: &Descriptors,
        memory: Arc<dyn GuestDma>,
    ) -> Result<Self, BackendError> {
        let options = Options::default();
        let client = Client::inherit(&state.connected, descriptors, memory, &options)?;
        let client = Arc::new(client);
        let flags = MigrationFlags::from_bits_retain(state.migration);
        Ok(Self {
            migration: RemoteMigration::new(&client, flags),
            resettable: state.resettable,
            client,
        })
    }
}

impl Handover for Remote {
    fn describe(&self, descriptors: &mut Descriptors) -> Result<RemoteState, BackendError> {
        let migration = self.migration.as_ref();
        Ok(RemoteState {
            connected: self.client.describe(descriptors)?,
            resettable: self.resettable,
            migration: migration.map_or(0, |migration| migration.flags().bits()),
        })
    }

    fn leave(
        &self,
        limit: Duration,
        descriptors: &mut Descriptors,
    ) -> Result<Standing, BackendError> {
        Ok(self.client.hand_over(limit, descriptors)?)
    }

    fn take_over(
        &self,
        standing: &Standing,
        descriptors: &Descriptors,
    ) -> Result<(), BackendError> {
        Ok(self.client.take_over(standing, descriptors)?)
    }

    fn go_on(&self) -> Result<(), BackendError> {
        Ok(self.client.go_on()?)
    }

    fn is_away(&self) -> bool {
        self.client.state() == State::Away
    }

    fn setup(&self) -> Setup {
        self.client.setup()
    }
}
