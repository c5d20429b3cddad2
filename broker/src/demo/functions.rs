//! The functions of a host of the soft fabric, as the lender's verbs see them.

use crate::daemon::host::{Functions, OpenFunction};
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::sync::Arc;
use vfio_shim::model::{Bdf, ConfigView, Function, FunctionIds, RegionIndex};
use vfio_shim::ntb::soft::{SoftFunction, SoftPf};
use vfio_shim::path::Keep;

/// PFs in software, and their VFs.
pub(super) struct SoftFunctions {
    pfs: Vec<Arc<SoftPf>>,
}

impl SoftFunctions {
    pub(super) fn new(pfs: Vec<Arc<SoftPf>>) -> Self {
        Self { pfs }
    }

    fn find(&self, bdf: Bdf) -> Result<Arc<SoftFunction>, VerbError> {
        let own = |pf: &Arc<SoftPf>| (pf.bdf(), Arc::clone(pf.function()));
        let all = self.pfs.iter().flat_map(|pf| {
            let vfs = pf.vfs();
            vfs.into_iter().chain([own(pf)])
        });
        let mut found = all.filter(|(at, _)| *at == bdf);
        found.next().map(|(_, function)| function).ok_or_else(|| {
            let text = format!("there is no PCI function {bdf} on this host");
            VerbError::new(ErrorCode::UnknownFunction, text)
        })
    }
}

/// All of its config space.
pub(super) fn config_space(function: &dyn Function) -> Result<Vec<u8>, VerbError> {
    let region = &function.info().regions[RegionIndex::CONFIG.0 as usize];
    let mut config = vec![0; region.size as usize];
    let read = function.region_read(RegionIndex::CONFIG, 0, &mut config);
    read.map_err(|error| {
        let text = vfio_shim::path::words(&error);
        VerbError::new(ErrorCode::Kernel, text)
    })?;
    Ok(config)
}

impl Functions for SoftFunctions {
    fn check_exists(&self, bdf: Bdf) -> Result<(), VerbError> {
        self.find(bdf).map(drop)
    }

    fn ids(&self, bdf: Bdf) -> Result<FunctionIds, VerbError> {
        Ok(self.find(bdf)?.info().ids)
    }

    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError> {
        let pf = self.pfs.iter().find(|pf| pf.bdf() == bdf);
        let count = pf.map_or(0, |pf| pf.vfs().len());
        if count == 0 {
            return self.check_exists(bdf);
        }
        let text = format!("{bdf} has SR-IOV on ({count} virtual functions): lend those");
        Err(VerbError::new(ErrorCode::SriovOn, text))
    }

    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError> {
        let function = self.find(bdf)?;
        let config = config_space(&*function)?;
        Ok(OpenFunction {
            function,
            serial: ConfigView::new(&config).map_or(0, |view| view.serial()),
            keep: Keep::default(),
        })
    }
}
