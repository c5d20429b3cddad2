//! One port of this host: its NTB, opened, and the engine that drives it.

use super::HostError;
use crate::config::{FarEnd, NotBelieved, PortConfig};
use std::sync::Arc;
use vfio_shim::iova::window_base;
use vfio_shim::model::Bdf;
use vfio_shim::ntb::NtbPort;
use vfio_shim::path::{Engine, EngineConfig, LeasePool, Limits, PortStatus};

/// An open port. Fields drop in order: the engine's threads end before the NTB is closed.
pub(super) struct OpenPort {
    pub(super) name: String,
    pub(super) bdf: Bdf,
    pub(super) trust_vmm: bool,
    pub(super) trust_domain: String,
    pub(super) engine: Arc<Engine>,
    pub(super) port: Arc<dyn NtbPort>,
    pub(super) window_bytes: u64,
    pub(super) far: FarEnd,
}

impl OpenPort {
    /// Starts the threads of an open NTB; this pool grants its leases.
    pub(super) fn start(
        (node, limits): (u16, Limits),
        (config, far): (&PortConfig, FarEnd),
        port: Arc<dyn NtbPort>,
        pool: Arc<dyn LeasePool>,
    ) -> Result<Self, HostError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| HostError::Open {
            name: config.name.clone(),
            bdf: config.bdf,
            source,
        };
        let limit = config.window_limit_bytes.unwrap_or(u64::MAX);
        let window_bytes = port.info().window_bytes[0].min(limit);
        let usable = port.address_space().usable();
        let base = window_base(&usable, window_bytes).map_err(|error| failed(error.into()))?;
        let told = EngineConfig {
            name: config.name.clone(),
            node,
            window_base: base,
            window_bytes,
            heartbeat_ms: config.heartbeat.as_millis() as u64,
            lost_after_ms: config.lost_after.as_millis() as u64,
            limits,
        };
        let engine = Engine::start_with_pool(Arc::clone(&port), told, pool);
        let engine = engine.map_err(|source| HostError::Start {
            name: config.name.clone(),
            source,
        })?;
        Ok(Self {
            name: config.name.clone(),
            bdf: config.bdf,
            trust_vmm: config.trust_vmm,
            trust_domain: config.trust_domain.clone(),
            engine,
            port,
            window_bytes,
            far,
        })
    }

    /// Who is at the far end, while a link session is open; nobody, if it cannot be who it says.
    pub(super) fn peer_node(&self) -> Option<u16> {
        self.far_end(self.engine.status().as_ref())?.ok()
    }

    /// What the peer says, held against the configuration.
    pub(super) fn far_end(&self, status: Option<&PortStatus>) -> Option<Result<u16, NotBelieved>> {
        let said = status?.session.as_ref()?.info.peer_node?;
        Some(self.far.check(said))
    }
}
