//! `sublet demo`: two hosts of the soft fabric in one process, a VMM in another, and every claim checked on what is seen.
//!
//! ```text
//! operator's verbs --control sockets--> host 4 (lends) == soft NTB == host 8 (borrows)
//!                                         SoftPf, VFs                   vfio-user socket <-- VMM (child process): guest
//! ```
//! Both hosts are the daemon's own code; only ports and functions are the fabric's. It needs no
//! right but to make files in a temporary folder, which goes at the end with all that is in it.

mod claim;
mod fabric;
mod functions;
mod guest;
mod left;
mod linux;
mod program;
mod report;
mod stop;
mod story;
mod vmm;

pub use claim::{Claim, DemoError};
pub use linux::{Qemu, become_qemu, run_init};
pub use report::{Broken, Figures, Report, Step};
pub use vmm::{GuestKind, run as run_vmm};

use std::time::{Duration, Instant};
use stop::Stop;
use story::Story;

/// Who watches how it goes.
pub trait Watch {
    /// A claim is about to be checked.
    fn begins(&mut self, claim: Claim);
    /// It holds.
    fn holds(&mut self, step: &Step);
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// A claim to be made false.
    pub fault: Option<Claim>,
    /// A Linux guest instead of the tiny one.
    pub linux: Option<Qemu>,
}

/// Runs it to its end, or to the first claim that does not hold, and takes everything down again.
pub fn run(wish: &Wish, watch: &mut dyn Watch) -> (Report, Result<(), DemoError>) {
    let mut report = Report::default();
    let start = Instant::now();
    let result = whole(wish, watch, &mut report);
    report.ms = ms(start.elapsed());
    report.holds = result.is_ok();
    report.broken = result.as_ref().err().map(Broken::from);
    (report, result)
}

fn whole(wish: &Wish, watch: &mut dyn Watch, report: &mut Report) -> Result<(), DemoError> {
    let stop = Stop::register()?;
    let version = wish.linux.as_ref().map(Qemu::check).transpose()?;
    let folder = tempfile::Builder::new()
        .prefix("sublet-demo.")
        .tempdir()
        .map_err(|error| DemoError::Folder {
            folder: std::env::temp_dir(),
            cause: error.to_string(),
        })?;
    let mut story = Story::new(folder.path(), wish, &stop)?;
    report.qemu = version;
    let told = story.tell(watch, report);
    drop(story);
    let closed = folder.close();
    told?;
    closed.map_err(|error| Claim::Left.broken(format!("its folder: {error}")))
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
