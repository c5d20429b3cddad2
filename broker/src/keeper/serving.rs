//! A keeper's parts in their order: its folder, socket and journal, then what was bound before it, then whoever connects.

use super::{
    KeeperError, functions_socket,
    holds::{Ground, Holds, Waits},
    journal::Journal,
    journal_folder, kernel,
    serve::{self, Service},
    socket,
};
use crate::config::Config;
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};
use vfio_shim::model::Runtime;

/// A folder that is this keeper's alone, and what it needs of it.
pub struct Claimed {
    uid: u32,
    functions: OwnedFd,
    journal: Journal,
}

/// A keeper that has taken over what the last one had bound, and gives it back where nobody has it.
pub struct Serving {
    uid: u32,
    functions: OwnedFd,
    holds: Arc<Holds>,
    runtime: Arc<dyn Runtime>,
}

impl Claimed {
    /// Of a keeper that serves the user `uid`. Whoever connects from now on waits.
    pub fn at(folder: &Path, uid: u32) -> Result<Self, KeeperError> {
        socket::claim_folder(folder)?;
        Ok(Self {
            uid,
            functions: socket::listen_at(&functions_socket(folder), uid)?,
            journal: Journal::open(&journal_folder(folder)).map_err(kernel("open its journal"))?,
        })
    }

    /// Its socket, which its process keeps.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.functions.as_fd()
    }

    /// Takes over, and looks after what is nobody's in a thread of its own.
    pub fn take_over(
        self,
        runtime: Arc<dyn Runtime>,
        config: Config,
        ground: Ground,
        waits: Waits,
    ) -> Result<Serving, KeeperError> {
        let holds = Holds::new(config, ground, self.journal, waits, Arc::clone(&runtime));
        let holds = Arc::new(holds.map_err(kernel("read its journal"))?);
        let tending = Arc::clone(&holds);
        let spawned = runtime.spawn(
            "orphans".to_owned(),
            Box::new(move || tending.tend_orphans()),
        );
        spawned.map_err(kernel("start a thread"))?;
        Ok(Serving {
            uid: self.uid,
            functions: self.functions,
            holds,
            runtime,
        })
    }
}

impl Serving {
    /// Serves until one of `ends` is readable. Connections that are there then go on until the
    /// process ends.
    pub fn serve(&self, ends: &[BorrowedFd<'_>]) -> io::Result<()> {
        let service = Service::Functions(Arc::clone(&self.holds));
        serve::serve(
            self.functions.as_fd(),
            self.uid,
            &service,
            ends,
            &self.runtime,
        )
    }
}
