//! A third host, at the end of a second cable of one that stays, behind a second port of that host's.

use crate::host::{Host, HostSpec, NTB_BDF, vfio_user_device};
use crate::lab::Lab;
use crate::ntb::Ntb;
use crate::pci;
use crate::sublet::{self, Daemon, Workers};
use anyhow::Result;
use std::fs;

/// The port to the third host, and its NTB, behind the root port after the first NTB's.
pub const SECOND_PORT: &str = "ntb1";
pub const SECOND_NTB_BDF: &str = "0000:03:00.0";

/// The third host, with a daemon that borrows.
pub struct Third {
    pub host: Host,
    pub daemon: Daemon,
    /// The other host's port to it.
    port: u32,
}

/// A host that has the near end of this cable as well.
pub fn plugged(mut spec: HostSpec, cable: &Ntb) -> HostSpec {
    let device = vfio_user_device(&cable.socket_a.display().to_string(), Some("rp2"));
    let words = ["-device", "pcie-root-port,id=rp2,slot=3,addr=7", "-device"];
    spec.arguments.extend(words.map(str::to_owned));
    spec.arguments.push(device);
    spec
}

/// A configuration with the second port.
pub fn config(text: &str) -> String {
    format!(
        "{text}\n[[port]]\nname = \"{SECOND_PORT}\"\nbdf = \"{SECOND_NTB_BDF}\"\npeers = \"cable\"\n\
         trust_domain = \"third\"\nheartbeat_ms = 250\nlost_after_ms = 10000\n"
    )
}

/// The same of host A's alone.
pub fn config_of_a(text: &str) -> String {
    match text.contains(r#"name = "a""#) {
        true => config(text),
        false => text.to_owned(),
    }
}

impl Third {
    /// Boots it at the far end of a cable, and starts the other host's port to it.
    pub fn start(lab: &Lab, cable: &Ntb, other: &Daemon) -> Result<Self> {
        let text = sublet::config("b.toml")?.replace("id = 8", "id = 12");
        let text = text.replace(r#""b""#, r#""c""#);
        fs::write(lab.dir.join("c.toml"), text)?;
        let spec = HostSpec::stock("c", &lab.cache)?.small();
        let mut host = lab.start_host(&spec.ntb(&cable.socket_b))?;
        host.wait_ready()?;
        pci::bind(&host.agent, NTB_BDF, "vfio-pci")?;
        let (program, config) = (lab.share_binary("sublet")?, host.shared("c.toml"));
        let daemon = Daemon::start_as(&host, &program, &config, Workers::Processes)?;
        let port = other.start_port_named(SECOND_PORT)?;
        daemon.wait_link()?;
        Ok(Third { host, daemon, port })
    }

    /// It is no more, and the port to it neither.
    pub fn end(self, other: &Daemon) -> Result<()> {
        self.daemon.stop()?;
        other.end(self.port)
    }
}
