//! A software PF with SR-IOV: makes and destroys its VFs, at the routing ids that its capability tells.

use super::{ARC_IDS, SoftFunction, VRAM_BYTES_MAX, arc, engine};
use crate::model::{Bdf, CONFIG_BYTES_MAX, EXT_CAP_SRIOV, FunctionIds};
use crate::ntb::soft::SoftHost;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many VFs a software PF can have.
pub const VFS_MAX: u16 = 24;

/// The capability and its registers (PCIe 6.0 section 9.3.3).
const SRIOV: u16 = 0x320;
const CONTROL: u16 = SRIOV + 0x08;
const VF_ENABLE_AND_MEMORY: u16 = 1 | 1 << 3;
const NUM_VFS: u16 = SRIOV + 0x10;
/// Offset to the first VF, and from one to the next.
const FIRST: u16 = 1;
const STRIDE: u16 = 1;
const EXT_CAP_VF_REBAR: u16 = 0x24;
const VF_REBAR: u16 = 0x220;

/// What the functions of a PF are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfShape {
    /// [`SoftFunction::new`].
    Engine {
        /// Ids of PF and VFs.
        ids: FunctionIds,
        /// MSI-X vectors of each.
        vectors: u16,
    },
    /// [`SoftFunction::arc_pro`].
    ArcPro {
        /// Bytes of each VF's BAR2.
        vram_bytes: u64,
    },
}

impl VfShape {
    fn ids(self) -> FunctionIds {
        match self {
            Self::Engine { ids, .. } => ids,
            Self::ArcPro { .. } => ARC_IDS,
        }
    }

    fn vf(self) -> io::Result<SoftFunction> {
        match self {
            Self::Engine { ids, vectors } => Ok(SoftFunction::new(ids, vectors)),
            Self::ArcPro { vram_bytes } => SoftFunction::arc_pro(vram_bytes),
        }
    }

    fn pf(self) -> io::Result<SoftFunction> {
        let sriov = sriov_body(self.ids().device);
        match self {
            Self::Engine { ids, vectors } => {
                let vectors = vectors.clamp(1, engine::VECTORS_MAX);
                let mut config = engine::config(&ids, vectors, CONFIG_BYTES_MAX);
                // The extended list begins at 100h: a null capability that only links.
                config.extended(0x100, 0, &[]);
                config.extended(SRIOV, EXT_CAP_SRIOV, &sriov);
                Ok(SoftFunction::engine_with(ids, vectors, config.seal()))
            }
            Self::ArcPro { vram_bytes } => {
                // Room for eight VFs: their BAR2 is the largest power of two that fits the PF's.
                let aperture = vram_bytes.saturating_mul(8).clamp(8 << 20, VRAM_BYTES_MAX);
                let aperture = aperture.next_power_of_two();
                let mut config = arc::config(aperture);
                config.extended(VF_REBAR, EXT_CAP_VF_REBAR, &arc::rebar_body(aperture / 8));
                config.extended(SRIOV, EXT_CAP_SRIOV, &sriov);
                SoftFunction::arc_with(aperture, config.seal())
            }
        }
    }
}

/// The capability behind its header, with no VF enabled.
fn sriov_body(vf_device: u16) -> Vec<u8> {
    let mut body = vec![0; 0x3c];
    let mut put = |at: u16, value: u16| {
        let at = usize::from(at - 4);
        body[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    put(0x0c, VFS_MAX);
    put(0x0e, VFS_MAX);
    put(0x14, FIRST);
    put(0x16, STRIDE);
    put(0x1a, vf_device);
    // Pages of 4 KiB, supported and set.
    put(0x1c, 1);
    put(0x20, 1);
    body
}

/// Why VFs were not made.
#[derive(Debug, thiserror::Error)]
pub enum SriovError {
    /// As the kernel's EBUSY: the count changes only by way of 0.
    #[error("{0} virtual functions are enabled; set their number to 0 first")]
    Enabled(u16),
    /// More than there can be.
    #[error("{0} virtual functions were asked for; there are {VFS_MAX}")]
    TooMany(u16),
    /// Memory for one.
    #[error("a virtual function's memory could not be made")]
    Memory(#[from] io::Error),
}

/// A PF and its VFs.
pub struct SoftPf {
    bdf: Bdf,
    shape: VfShape,
    host: Arc<SoftHost>,
    function: Arc<SoftFunction>,
    vfs: Mutex<Vec<(Bdf, Arc<SoftFunction>)>>,
}

impl SoftPf {
    /// A PF of this shape at this address of a host, without VFs.
    pub fn new(bdf: Bdf, shape: VfShape, host: Arc<SoftHost>) -> io::Result<Self> {
        let function = shape.pf()?.in_host(Arc::clone(&host));
        Ok(Self {
            bdf,
            shape,
            host,
            function: Arc::new(function),
            vfs: Mutex::default(),
        })
    }

    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The PF itself. It cannot be lent while it has VFs.
    pub fn function(&self) -> &Arc<SoftFunction> {
        &self.function
    }

    /// Its VFs now, by address.
    pub fn vfs(&self) -> Vec<(Bdf, Arc<SoftFunction>)> {
        self.lock().clone()
    }

    /// Makes so many VFs, or destroys all (0), as a write to `sriov_numvfs` does. Whoever still
    /// holds a destroyed one finds it gone from the bus.
    pub fn set_num_vfs(&self, count: u16) -> Result<(), SriovError> {
        let mut vfs = self.lock();
        if count > VFS_MAX {
            return Err(SriovError::TooMany(count));
        }
        if count != 0 && !vfs.is_empty() {
            return Err(SriovError::Enabled(vfs.len() as u16));
        }
        let made: io::Result<Vec<_>> = (0..count).map(|index| self.vf(index)).collect();
        let before = std::mem::replace(&mut *vfs, made?);
        before.iter().for_each(|(_, vf)| vf.vanish());
        let enabled = if count == 0 { 0 } else { VF_ENABLE_AND_MEMORY };
        let mut config = super::lock(&self.function.device.config);
        config.assign(NUM_VFS, &count.to_le_bytes());
        config.assign(CONTROL, &enabled.to_le_bytes());
        Ok(())
    }

    fn vf(&self, index: u16) -> io::Result<(Bdf, Arc<SoftFunction>)> {
        let offset = FIRST + STRIDE * index;
        let routing_id = self.bdf.routing_id().wrapping_add(offset);
        let bdf = Bdf::from_routing_id(self.bdf.domain(), routing_id);
        let function = self.shape.vf()?.in_host(Arc::clone(&self.host));
        Ok((bdf, Arc::new(function)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Bdf, Arc<SoftFunction>)>> {
        self.vfs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
