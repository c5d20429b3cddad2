//! `sublet demo`: the whole job on this machine alone, without hardware and without rights.

use super::exit;
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use crate::demo::{self, Claim, DemoError, GuestKind, Qemu, Report, Step, Watch, Wish};
use indicatif::{ProgressBar, ProgressStyle};
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How often the progress display turns.
const TICK: Duration = Duration::from_millis(80);

/// Lend a VF between two hosts of a soft fabric and show that every claim holds.
///
/// Both hosts run in this process, joined by an NTB in software; a VM in a second process borrows
/// a VF of the shape of an Arc Pro's. It needs no hardware and no rights, takes a few seconds, and
/// writes only to a temporary folder (TMPDIR), which it removes. The guest runs under KVM where
/// /dev/kvm opens, else in a user-space stand-in; the output says which.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// For tests: make this claim false on purpose, by a real fault. The demo must then fail and
    /// name the claim.
    #[arg(long, value_enum, value_name = "CLAIM")]
    fault: Option<Claim>,
    /// Boot a Linux guest under QEMU (10.1 or newer) instead of the tiny one; it runs nothing but
    /// this program.
    #[arg(long, requires = "kernel")]
    linux: bool,
    /// The guest's kernel image, such as /boot/vmlinuz-VERSION.
    #[arg(long, value_name = "FILE", requires = "linux")]
    kernel: Option<PathBuf>,
    /// The QEMU to be used.
    #[arg(
        long,
        value_name = "PATH",
        requires = "linux",
        default_value = "qemu-system-x86_64"
    )]
    qemu: PathBuf,
    /// QEMU's accelerator (kvm, tcg); by default KVM where /dev/kvm opens.
    #[arg(long, value_name = "NAME", requires = "linux")]
    accel: Option<String>,
}

/// A process of the demonstration beside the one that was started by hand.
pub(super) trait Helper {
    fn main(&self) -> io::Result<()>;

    fn run(&self) -> Result<(), VerbError> {
        let done = self.main();
        done.map_err(|error| VerbError::new(ErrorCode::Kernel, error.to_string()))
    }
}

/// The demonstration's VMM.
#[derive(Debug, clap::Args)]
pub(super) struct VmmArgs {
    /// The vfio-user socket of the function.
    #[arg(long)]
    socket: PathBuf,
    /// The process that it ends with.
    #[arg(long)]
    parent: i32,
}

/// What becomes QEMU.
#[derive(Debug, clap::Args)]
pub(super) struct QemuArgs {
    /// The process that it ends with.
    #[arg(long)]
    parent: i32,
    /// QEMU and its arguments.
    #[arg(last = true)]
    argv: Vec<OsString>,
}

/// A Linux guest's only program.
#[derive(Debug, clap::Args)]
pub(super) struct InitArgs {}

impl Helper for VmmArgs {
    fn main(&self) -> io::Result<()> {
        demo::run_vmm(&self.socket, self.parent)
    }
}

impl Helper for QemuArgs {
    fn main(&self) -> io::Result<()> {
        demo::become_qemu(self.parent, &self.argv)
    }
}

impl Helper for InitArgs {
    fn main(&self) -> io::Result<()> {
        demo::run_init()
    }
}

impl Args {
    pub fn run(&self, as_json: bool) -> ExitCode {
        if let Some(claim) = self.fault {
            let told = format!("fault for claim `{claim}`: {}\n", claim.fault());
            let _ = io::stderr().lock().write_all(told.as_bytes());
        }
        let mut view = View::new(as_json);
        let kernel = self.kernel.clone().filter(|_| self.linux);
        let wish = Wish {
            fault: self.fault,
            linux: kernel.map(|kernel| Qemu {
                program: self.qemu.clone(),
                kernel,
                accel: self.accel.clone(),
            }),
        };
        let (report, result) = demo::run(&wish, &mut view);
        view.ends();
        let written = match as_json {
            true => exit::write(&format!("{}\n", serde_json::json!(report))),
            false => exit::write(&summary(&report)),
        };
        match (result, written) {
            (Ok(()), written) => exit::code(written.err()),
            (Err(error), _) => {
                let code = match error {
                    DemoError::Broken { .. } => ErrorCode::Demo,
                    DemoError::Setup { .. } | DemoError::Folder { .. } => ErrorCode::Kernel,
                    DemoError::Signal => ErrorCode::Stopping,
                };
                // With `--json` the report on stdout tells it already.
                exit::refuse(&VerbError::new(code, error.to_string()), false)
            }
        }
    }
}

/// The last line of a run to its end.
fn summary(report: &Report) -> String {
    if !report.holds {
        return String::new();
    }
    let guest = match report.guest {
        Some(GuestKind::Kvm) => "guest: kvm",
        Some(GuestKind::Linux) => "guest: Linux",
        _ => "guest: a user-space stand-in, as /dev/kvm does not open",
    };
    format!(
        "{} claims hold, in {:.2} s; {guest}\n",
        report.steps.len(),
        report.ms / 1e3
    )
}

/// How it is shown as it goes.
enum View {
    /// On a terminal, with what is under way in the last line.
    Terminal(ProgressBar),
    /// Into a pipe or a file.
    Plain,
    /// Not at all: the report comes at the end.
    Quiet,
}

impl View {
    fn new(as_json: bool) -> Self {
        if as_json {
            return Self::Quiet;
        }
        if !io::stdout().is_terminal() {
            return Self::Plain;
        }
        let bar = ProgressBar::new(Claim::ALL.len() as u64);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Self::Terminal(bar)
    }

    fn ends(&self) {
        if let Self::Terminal(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn told(step: &Step) -> String {
    let shown = step
        .shown
        .iter()
        .map(|line| format!("\n             {line}"));
    let shown: String = shown.collect();
    format!("[{:>7.1} ms] {}{shown}", step.ms, step.says)
}

impl Watch for View {
    fn begins(&mut self, claim: Claim) {
        if let Self::Terminal(bar) = self {
            bar.set_message(claim.says());
        }
    }

    fn holds(&mut self, step: &Step) {
        match self {
            Self::Terminal(bar) => {
                bar.println(told(step));
                bar.inc(1);
            }
            // To a closed pipe there is nobody to tell.
            Self::Plain => drop(exit::write(&format!("{}\n", told(step)))),
            Self::Quiet => {}
        }
    }
}
