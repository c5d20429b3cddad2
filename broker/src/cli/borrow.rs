//! `sublet borrow`: borrows a function and serves it to one VMM.

use super::list;
use crate::{
    config::parse_size,
    daemon::vocabulary::{BarMode, BorrowedFunction, ErrorCode, Location, Verb, VerbError},
};
use std::{fmt::Display, path::PathBuf};
use vfio_shim::model::Fdid;

/// Borrow a function and serve it to one VMM.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function's fabric device id, as `list` prints it.
    fdid: Fdid,
    /// The vfio-user socket for the VMM; a bare name lies in the configured directory. By default it
    /// lies in a folder of the lease's own there, and is told.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The guest's memory (512M, 4G): refused here and now if the window does not hold it.
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    ram: Option<u64>,
    /// How its BARs reach the guest; by default as the configuration says.
    #[arg(long, value_enum, value_name = "MODE")]
    bars: Option<BarMode>,
    /// Trust the VMM as much as the port; `--bars mapped` needs it.
    #[arg(long)]
    trust_vmm: bool,
    /// Whose the guest is; by default the port's trust domain.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<String>,
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        let mut socket = self.socket.clone().unwrap_or_default();
        // Relative to where the operator is, not to where the daemon is.
        if socket.components().count() > 1 {
            socket = std::path::absolute(&socket)
                .map_err(|e| VerbError::new(ErrorCode::Usage, format!("--socket: {e}")))?;
        }
        Ok(Verb::Borrow {
            fdid: self.fdid.into(),
            socket,
            ram: self.ram,
            bars: self.bars,
            trust_vmm: self.trust_vmm,
            trust_domain: self.trust_domain.clone(),
        })
    }
}

/// smartio_tool's block of fields, and the socket.
pub(crate) fn block(borrowed: &BorrowedFunction) -> String {
    let location = match borrowed.location {
        Location::Local => "local",
        Location::Remote => "remote",
    };
    let function = &borrowed.function;
    let fields = [
        ("Name", function.name.clone()),
        ("Available", list::word(borrowed.available).to_owned()),
        ("Location", location.to_owned()),
        ("Adapter", borrowed.adapter.to_string()),
        ("NodeId", borrowed.node_id.to_string()),
        ("Remote BDF", borrowed.remote_bdf.to_string()),
        ("Physical slot", known(borrowed.physical_slot.as_ref())),
        ("Serial Number", known(borrowed.serial.map(|s| serial(s.0)))),
        ("UUID", known(borrowed.uuid.as_ref())),
        ("Vendor ID", function.vendor.to_string()),
        ("Device ID", function.device.to_string()),
        ("Subsystem Vendor ID", function.subsystem_vendor.to_string()),
        ("Subsystem Device ID", function.subsystem_device.to_string()),
        ("Local users", borrowed.local_users.to_string()),
        ("Local virtual device", known(borrowed.local_virtual_device)),
        ("Bound to driver", known(borrowed.driver.as_ref())),
        ("Socket", borrowed.socket.display().to_string()),
    ];
    let lines = fields.map(|(name, value)| format!("{name}: {value}"));
    lines.join("\n")
}

fn known(value: Option<impl Display>) -> String {
    value.map_or("N/A".to_owned(), |value| value.to_string())
}

/// A device serial number as lspci prints it.
fn serial(serial: u64) -> String {
    serial
        .to_be_bytes()
        .map(|byte| format!("{byte:02x}"))
        .join("-")
}
