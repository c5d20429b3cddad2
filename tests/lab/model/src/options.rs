//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser};

use crate::half::Side;
use crate::registers::IntvecReset;

/// Talk to a running model.
#[derive(Debug, Parser)]
#[command(name = "ntb-model ctl")]
pub struct CtlOptions {
    /// The running model's control socket.
    pub control: PathBuf,
    /// counters | state | maps a | maps b | flap MS | link up | link down | fault NAME | fault none
    #[arg(required = true)]
    pub operation: Vec<String>,
}

/// An Intel gen4 NTB between two hosts: a vfio-user server with two sockets.
///
/// `ntb-model ctl CONTROL OPERATION` talks to one that runs.
#[derive(Debug, Clone, Parser)]
#[command(name = "ntb-model")]
pub struct ServeOptions {
    /// Socket of half A (upstream side).
    #[arg(long)]
    pub socket_a: PathBuf,
    /// Socket of half B.
    #[arg(long)]
    pub socket_b: PathBuf,
    /// Control socket: one JSON object per line.
    #[arg(long)]
    pub control: Option<PathBuf>,
    /// End when standard input is closed.
    #[arg(long)]
    pub die_with_stdin: bool,
    #[command(flatten)]
    pub device: DeviceOptions,
}

/// The variations of the device.
#[derive(Debug, Clone, Args)]
pub struct DeviceOptions {
    /// Size of half A's BAR2, a power of two.
    #[arg(long, default_value = "1073741824", value_parser = window_bytes)]
    pub bar2_bytes_a: u64,
    /// Size of half B's BAR2, a power of two.
    #[arg(long, default_value = "1073741824", value_parser = window_bytes)]
    pub bar2_bytes_b: u64,
    /// Size of BAR4 of both halves, a power of two.
    #[arg(long, default_value = "1048576", value_parser = window_bytes)]
    pub bar4_bytes: u64,
    /// PCI device id: 347e (SPR, EMR) or 0db4 (GNR).
    #[arg(long, default_value = "347e")]
    pub device_id: DeviceId,
    /// What INTVEC holds after a reset.
    #[arg(long, value_enum, default_value_t)]
    pub intvec_reset: IntvecReset,
    /// Milliseconds that the link trains after both halves have enabled it.
    #[arg(long, default_value_t = 0)]
    pub late_link_up: u64,
    /// A function without a reset method: DEVICE_RESET is not offered and not done.
    #[arg(long)]
    pub no_reset: bool,
    /// A fault to build in, to see a test fail.
    #[arg(long, value_enum)]
    pub fault: Option<Fault>,
}

/// Faults of the bridge that a test can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// No doorbell reaches the peer.
    DropDoorbells,
    /// No window write reaches the peer.
    DropWrites,
}

/// A PCI device id of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceId(pub u16);

impl FromStr for DeviceId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match u16::from_str_radix(text, 16) {
            Ok(id @ (0x347E | 0x0DB4)) => Ok(Self(id)),
            _ => Err("this model is an 347e or a 0db4".into()),
        }
    }
}

fn window_bytes(text: &str) -> Result<u64, String> {
    let bytes: u64 = text.parse().map_err(|error| format!("{error}"))?;
    if bytes.is_power_of_two() && (4096..=1 << 40).contains(&bytes) {
        Ok(bytes)
    } else {
        Err("a window is a power of two from 4096 on".into())
    }
}

impl DeviceOptions {
    /// Size of a half's BAR2.
    pub fn bar2_bytes(&self, side: Side) -> u64 {
        match side {
            Side::A => self.bar2_bytes_a,
            Side::B => self.bar2_bytes_b,
        }
    }

    /// Revision id: the driver tells SPR from ICX by it.
    pub fn revision(&self) -> u8 {
        if self.device_id.0 == 0x347E { 0x10 } else { 0 }
    }

    /// How long the link trains.
    pub fn training(&self) -> Duration {
        Duration::from_millis(self.late_link_up)
    }
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            bar2_bytes_a: 1 << 30,
            bar2_bytes_b: 1 << 30,
            bar4_bytes: 1 << 20,
            device_id: DeviceId(0x347E),
            intvec_reset: IntvecReset::Table,
            late_link_up: 0,
            no_reset: false,
            fault: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &[&str]) -> Result<ServeOptions, clap::Error> {
        let base = ["ntb-model", "--socket-a", "a", "--socket-b", "b"];
        ServeOptions::try_parse_from(base.iter().chain(more))
    }

    #[test]
    fn device_other_than_the_family_and_windows_of_odd_size_are_refused() {
        assert!(parse(&[]).is_ok());
        assert!(parse(&["--device-id", "0db4", "--bar2-bytes-a", "4096"]).is_ok());
        assert!(parse(&["--device-id", "201c"]).is_err());
        assert!(parse(&["--bar2-bytes-b", "4097"]).is_err());
        assert!(parse(&["--bar4-bytes", "2048"]).is_err());
    }

    #[test]
    fn both_sockets_are_needed_and_the_rest_has_the_silicon_s_values() {
        assert!(ServeOptions::try_parse_from(["ntb-model", "--socket-a", "a"]).is_err());
        let options = parse(&["--control", "c"]).expect("complete");
        assert_eq!(options.device.bar2_bytes(Side::B), 1 << 30);
        assert_eq!(options.device.revision(), 0x10);
        assert_eq!(options.device.fault, None);
    }

    #[test]
    fn ctl_takes_a_socket_and_words() {
        assert!(CtlOptions::try_parse_from(["ctl", "socket", "maps", "a"]).is_ok());
        assert!(CtlOptions::try_parse_from(["ctl", "socket"]).is_err());
    }
}
