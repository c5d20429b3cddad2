//! The demonstration's VMM, a process of its own: a VM with the tiny guest, and the function behind a vfio-user socket.
//!
//! It tells events as JSON lines on stdout. A line `go` on stdin opens the guest's next gate; the
//! end of stdin, or `leave`, ends it.

use super::program::{
    BAR0, BAR2, CONFIG, DATA_BYTES, GATE, MARK, Phase, Program, RAM_BYTES, RETURNED, SENT, VECTOR,
};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_shim::model::{Function, Span};
use vmm_glue::kvm::tiny::{self, Step, Verdict};
use vmm_glue::kvm::{Attachment, Ended, Placement, Ram, VcpuThread, Vm};
use vmm_glue::vfio_user::Client;

/// How long a phase may take. None takes this long but one that fails.
const PHASE_WAIT: Duration = Duration::from_secs(15);
/// How often the guest's mark is looked at.
const LOOK: Duration = Duration::from_micros(500);
/// Interrupts of the last phase that are proof of the guest's being at work.
const BUSY_INTERRUPTS: u64 = 4;

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// A VM of KVM.
    Kvm,
    /// A thread that does the guest's steps.
    StandIn,
    /// Linux under QEMU.
    Linux,
}

/// What the VMM tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// The guest is at its first gate.
    Ready {
        /// What runs it.
        guest: GuestKind,
        /// Why it is no VM, if so.
        why: Option<String>,
    },
    /// The guest has done a phase; the last one: is in it.
    Done {
        /// Which.
        phase: Phase,
        /// Interrupts taken since its start.
        interrupts: u64,
        /// CRC-32C of what was sent by DMA, and of what came back.
        checksums: [u32; 2],
    },
    /// It has not.
    Broken {
        /// Which.
        phase: Phase,
        /// Interrupts taken since its start.
        interrupts: u64,
        /// Whether it waits still, as against having seen something wrong.
        waits: bool,
        /// What is wrong.
        cause: String,
    },
    /// The VMM could not start.
    Failed {
        /// Why.
        cause: String,
    },
}

fn tell(event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// Runs until told to leave, or killed. Ends with its parent, whatever happens to that.
pub fn run(socket: &Path, parent: i32) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It went before that was set: nobody hears.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        return Ok(());
    }
    match Guest::start(socket) {
        Ok(guest) => guest.serve(),
        Err(error) => tell(&Event::Failed {
            cause: vfio_shim::path::words(&*error),
        }),
    }
}

/// Fields end in order: the vCPU, the attachment, the memory, the VM.
struct Guest {
    vcpu: VcpuThread,
    attachment: Arc<Attachment>,
    ram: Ram,
    vm: Vm,
    program: Program,
    why: Option<String>,
}

impl Guest {
    fn start(socket: &Path) -> Result<Self, Box<dyn Error>> {
        let (vm, why) = Vm::new_or_stand_in()?;
        let why = why.map(|error| vfio_shim::path::words(&error));
        let ram = vm.ram(Span::new(0, RAM_BYTES).ok_or("no such memory")?)?;
        fill(&ram);
        let function: Arc<dyn Function> = Arc::new(Client::connect(socket)?);
        let mut placement = Placement {
            config: CONFIG,
            ..Placement::default()
        };
        placement.bars[0] = Some(BAR0);
        placement.bars[2] = Some(BAR2);
        let attachment = Attachment::new(&vm, function, &placement, &[&ram])?;
        let program = Program::new();
        let vcpu = tiny::start(&vm, &ram, vec![Arc::clone(&attachment)], &program.steps)?;
        Ok(Self {
            vcpu,
            attachment,
            ram,
            vm,
            program,
            why,
        })
    }

    fn serve(mut self) -> io::Result<()> {
        tell(&Event::Ready {
            guest: match self.vm.is_kvm() {
                true => GuestKind::Kvm,
                false => GuestKind::StandIn,
            },
            why: self.why.take(),
        })?;
        let mut phases = Phase::ALL.into_iter();
        for line in io::stdin().lock().lines() {
            let phase = match line?.as_str() {
                "go" => phases.next(),
                _ => None,
            };
            let Some(phase) = phase else {
                break;
            };
            let event = self.phase(phase);
            tell(&event)?;
        }
        Ok(())
    }

    /// Opens the gate and waits for what comes of it.
    fn phase(&mut self, phase: Phase) -> Event {
        let before = self.interrupts();
        self.ram.write(GATE, &phase.word().to_le_bytes());
        let deadline = Instant::now() + PHASE_WAIT;
        loop {
            let ended = self.vcpu.wait(LOOK);
            let done = match phase {
                Phase::Busy => self.interrupts() >= before + BUSY_INTERRUPTS,
                _ => self.ram.read_u64(MARK) == Some(phase.word().into()),
            };
            if done {
                let checksums = [SENT, RETURNED].map(|at| checksum(&self.ram, at));
                return Event::Done {
                    phase,
                    interrupts: self.interrupts(),
                    checksums,
                };
            }
            let waits = ended.is_none();
            if !waits || Instant::now() >= deadline {
                return Event::Broken {
                    phase: self.place(ended.as_ref()).unwrap_or(phase),
                    interrupts: self.interrupts(),
                    waits,
                    cause: self.cause(ended),
                };
            }
        }
    }

    fn interrupts(&self) -> u64 {
        tiny::taken(&self.ram, VECTOR)
    }

    fn place(&self, ended: Option<&Ended>) -> Option<Phase> {
        match Verdict::of(code(ended)?) {
            Verdict::Mismatch(step) => Some(self.program.phase_of(step as usize)),
            _ => None,
        }
    }

    fn cause(&self, ended: Option<Ended>) -> String {
        let told = match (code(ended.as_ref()).map(Verdict::of), &ended) {
            (Some(Verdict::Mismatch(step)), _) => match self.program.steps.get(step as usize) {
                Some(Step::Expect { address, value, .. }) => {
                    format!("the guest read something else than {value:#x} at {address:#x}")
                }
                _ => format!("the guest ended at its step {step}"),
            },
            (Some(verdict), _) => format!("the guest ended: {verdict:?}"),
            (None, Some(ended)) => format!("the guest ended: {ended:?}"),
            (None, None) => format!("the guest still waits after {} s", PHASE_WAIT.as_secs()),
        };
        match self.attachment.take_trouble() {
            None => told,
            Some(trouble) => format!("{told}; {}", vfio_shim::path::words(&trouble)),
        }
    }
}

fn code(ended: Option<&Ended>) -> Option<u32> {
    match ended {
        Some(Ended::Exit(code)) => Some(*code),
        _ => None,
    }
}

/// Data of which no two pages are alike.
fn fill(ram: &Ram) {
    let words = DATA_BYTES / 8;
    for at in 0..words {
        let word = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ram.write(SENT + 8 * at, &word.to_le_bytes());
    }
}

fn checksum(ram: &Ram, at: u64) -> u32 {
    let mut data = vec![0; DATA_BYTES as usize];
    ram.read(at, &mut data);
    crc32c::crc32c(&data)
}
