//! A guest (L2) inside a host: QEMU or cloud-hypervisor under nested KVM, on hugepages.

use crate::agent::{Agent, SIGKILL};
use crate::cache::Cache;
use crate::host::{Host, QUICK, vfio_user_device};
use crate::initramfs::{Initramfs, PORT_NAME, Port};
use crate::log::{self, NESTED_FAULTS};
use crate::program::arguments;
use crate::shutdown;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a guest loads.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "nvme", "igbvf"];
/// QEMU brings one up in 10 to 16 s, on a machine at work on ten other things in more than 120.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// While a guest boots, its VMM is looked after this often.
const LOOK_AFTER_VMM: Duration = Duration::from_secs(3);
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// What the host's VMMs and programs do, a line for each thread: its state, its ticks as a user and
/// in the kernel, the guest's of them, and where it waits. A guest that stands still tells nothing.
const THREADS: &str = r#"for p in /proc/[0-9]*; do
    case "$(tr '\0' ' ' < "$p/cmdline" 2>/dev/null)" in *qemu*|*sublet*) ;; *) continue ;; esac
    for t in "$p"/task/*; do
        echo "$t $(cat "$t/comm"): $(sed 's/.*) //' "$t/stat" | cut -d' ' -f1,12,13,41) $(cat "$t/wchan")"
    done
done"#;

/// Which program runs the guest.
#[derive(Clone, Debug)]
pub enum Vmm {
    /// The newer Debian's.
    Qemu,
    /// A static binary, as a host sees it.
    CloudHypervisor(String),
}

/// What a guest's RAM is, on its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A memfd of hugepages, shared and allocated before the guest runs: what an operator should
    /// choose. A device's pin would allocate them otherwise, and an emulated processor takes
    /// seconds to clear pages that held another guest's code.
    HugePages,
    /// A memfd of ordinary pages, shared.
    Pages,
    /// A memfd that the VMM maps privately: a device would see other pages than the guest.
    Private,
}

/// QEMU's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// With SeaBIOS, which drives an NVMe before the kernel does.
    Q35,
    /// Its firmware knows no PCI: the kernel is the first to touch a device.
    Microvm,
}

/// What a guest is made of.
pub struct GuestSpec {
    /// Names its logs and sockets.
    pub name: String,
    /// The program.
    pub vmm: Vmm,
    /// QEMU's machine.
    pub machine: Machine,
    /// The size of its RAM.
    pub memory_mib: u32,
    /// The kind of its RAM.
    pub memory: Memory,
    /// Whether QEMU starts it again when it reboots; else that is its end.
    pub reboots: bool,
    /// vfio-user sockets on the host, one for each device.
    pub devices: Vec<String>,
    /// Modules: `name` or `name key=value`.
    pub modules: Vec<String>,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Shell lines that run before any module is loaded: no driver has touched a device then.
    pub early: String,
}

impl GuestSpec {
    /// A guest of 128 MiB with the stock kernel.
    pub fn stock(name: &str, vmm: &Vmm) -> Self {
        GuestSpec {
            name: name.to_owned(),
            vmm: vmm.clone(),
            machine: Machine::Q35,
            memory_mib: 128,
            memory: Memory::HugePages,
            reboots: false,
            devices: Vec::new(),
            modules: MODULES.map(str::to_owned).to_vec(),
            cmdline: String::new(),
            early: String::new(),
        }
    }

    /// Attaches the device behind a vfio-user socket.
    pub fn device(mut self, socket: &str) -> Self {
        self.devices.push(socket.to_owned());
        self
    }
}

/// A running guest.
pub struct Guest {
    /// Its agent, reached through its host's.
    pub agent: Agent,
    /// The VMM's process id on the host.
    pub pid: u32,
    /// The size of its RAM.
    pub memory_mib: u32,
    /// What its kernel says, a file on the host.
    pub console: String,
    host: Agent,
    sockets: Vec<String>,
    /// Whether the console is there from the kernel's start on; hvc0 comes with its module.
    tells_all: bool,
    /// The scenario's folder, outside.
    dir: PathBuf,
}

impl Guest {
    /// Starts the VMM; the guest is up after [`Guest::wait_ready`].
    pub fn start(spec: &GuestSpec, host: &Host, cache: &Cache) -> Result<Self> {
        let kernel = cache.kernel()?;
        let name = &spec.name;
        let initramfs = format!("guest-{name}.cpio");
        Initramfs {
            kernel: &kernel,
            modules: spec.modules.clone(),
            files: Vec::new(),
            built_modules: Vec::new(),
            early: spec.early.clone(),
            setup: String::new(),
            port: match spec.vmm {
                Vmm::Qemu => Port::Virtio,
                Vmm::CloudHypervisor(_) => Port::Serial("ttyS0"),
            },
        }
        .write(cache, &host.dir.join(&initramfs))?;
        let image = host.cache.join(kernel.image.strip_prefix(&cache.root)?);
        let paths = Paths {
            kernel: image.display().to_string(),
            initramfs: host.shared(&initramfs),
            console: host.shared(&format!("guest-{name}.log")),
            agent: format!("/run/guest-{name}.agent"),
            control: format!("/run/guest-{name}.api"),
        };
        let argv = match &spec.vmm {
            Vmm::Qemu => qemu(spec, &paths, &host.cache),
            Vmm::CloudHypervisor(program) => cloud_hypervisor(spec, &paths, program),
        };
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        shutdown::tell(&host.agent)?;
        let pid = host
            .agent
            .spawn(&argv, &host.shared(&format!("guest-{name}-vmm.log")))?;
        Ok(Guest {
            agent: host.agent.beyond(&paths.agent),
            pid,
            memory_mib: spec.memory_mib,
            console: paths.console,
            host: host.agent.clone(),
            // cloud-hypervisor leaves the lock of its control socket behind.
            sockets: vec![
                paths.agent,
                format!("{}.lock", paths.control),
                paths.control,
            ],
            tells_all: matches!(spec.vmm, Vmm::Qemu),
            dir: host.dir.clone(),
        })
    }

    /// Waits for its agent, or for its VMM's end.
    pub fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + BOOT_TIMEOUT;
        loop {
            let Err(error) = self.agent.wait_ready(LOOK_AFTER_VMM) else {
                return Ok(());
            };
            if let Ok(code) = self.host.wait(self.pid, Duration::ZERO) {
                return Err(error).context(format!("the VMM ended with {code:?}{}", self.end()?));
            }
            // A VMM that met one stands still for ever, or has no host any more.
            if let Some(fault) = log::first_of(&self.dir, &NESTED_FAULTS) {
                bail!("a fault of TCG: {fault}");
            }
            if Instant::now() >= deadline {
                let threads = self.host.sh(THREADS);
                let threads = threads.unwrap_or_else(|error| format!("{error:#}"));
                let log = self.dir.join(format!("stuck-{}.log", self.pid));
                std::fs::write(log, threads)?;
                bail!("not up within {BOOT_TIMEOUT:?}: {error:#}");
            }
        }
    }

    /// What KVM has to say of a VMM that has ended.
    fn end(&self) -> Result<String> {
        let Some(line) = shutdown::of(&self.host, self.pid)? else {
            return Ok(String::new());
        };
        if self.tells_all {
            let console = self.console.rsplit('/').next().unwrap_or_default();
            let kept = self.dir.join(format!("shutdown-{}.log", self.pid));
            shutdown::keep_if_not_ours(&line, &self.dir.join(console), &kept)?;
        }
        Ok(format!(", its processor by a triple fault: {line}"))
    }

    /// Lines of the guest's kernel log that match an extended expression, in either case. A serial
    /// line takes half a minute for all of the log.
    pub fn dmesg(&self, expression: &str) -> Result<String> {
        let filtered = format!("dmesg | grep -iE '{expression}' || true");
        self.agent.sh(&filtered)
    }

    /// Powers it off and waits for the VMM's end.
    pub fn shut_down(self) -> Result<()> {
        // The answer may be lost with the guest: what counts is the end of the VMM.
        let _ = self
            .agent
            .try_run(&["poweroff", "-f"], &[], Duration::from_secs(1));
        let code = self.host.wait(self.pid, END_TIMEOUT)?;
        ensure!(code == Some(0), "the VMM ended with {code:?}");
        self.remove_sockets()
    }

    /// Its kernel faults until the processor shuts down, by `reboot=t`; what is told of that.
    pub fn shut_down_by_fault(self) -> Result<String> {
        let _ = self
            .agent
            .try_run(&["reboot", "-f"], &[], Duration::from_secs(1));
        self.host.wait(self.pid, END_TIMEOUT)?;
        let end = self.end()?;
        self.remove_sockets()?;
        Ok(end)
    }

    /// Kills the VMM.
    pub fn kill(self) -> Result<()> {
        self.host.kill(self.pid, SIGKILL)?;
        self.host.wait(self.pid, END_TIMEOUT)?;
        self.remove_sockets()
    }

    /// Whatever is left of the VMM goes; one that has ended by itself is no error.
    pub fn clear_away(self) -> Result<()> {
        self.host
            .sh(&format!("kill -9 {} 2>/dev/null || :", self.pid))?;
        self.host.wait(self.pid, END_TIMEOUT)?;
        self.remove_sockets()
    }

    fn remove_sockets(&self) -> Result<()> {
        let mut argv = vec!["rm", "-f"];
        argv.extend(self.sockets.iter().map(String::as_str));
        self.host.run(&argv).map(drop)
    }
}

struct Paths {
    kernel: String,
    initramfs: String,
    console: String,
    agent: String,
    control: String,
}

fn qemu(spec: &GuestSpec, paths: &Paths, cache: &Path) -> Vec<String> {
    let mib = spec.memory_mib;
    let memory = match spec.memory {
        Memory::HugePages => "hugetlb=on,hugetlbsize=2M,share=on,prealloc=on",
        Memory::Pages => "share=on",
        Memory::Private => "share=off",
    };
    let mut argv = Cache::qemu(cache);
    argv.extend(arguments(&format!(
        "-M {machine},memory-backend=m
        -accel kvm
        -cpu host
        -smp 1
        -m {mib}M
        -object memory-backend-memfd,id=m,size={mib}M,{memory}
        -nodefaults
        -display none
        -nic none
        -serial file:{console}
        -kernel {kernel}
        -initrd {initramfs}
        -append console=ttyS0 quiet {QUICK} {cmdline}
        -device virtio-serial-pci
        -chardev socket,id=agent,path={agent},server=on,wait=off
        -device virtserialport,chardev=agent,name={PORT_NAME}
        -qmp unix:{control},server=on,wait=off",
        machine = match spec.machine {
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm,pcie=on",
        },
        console = paths.console,
        kernel = paths.kernel,
        initramfs = paths.initramfs,
        cmdline = spec.cmdline,
        agent = paths.agent,
        control = paths.control,
    )));
    if !spec.reboots {
        argv.push("-no-reboot".into());
    }
    for socket in &spec.devices {
        argv.push("-device".into());
        argv.push(vfio_user_device(socket, None));
    }
    argv
}

/// The agent has the serial line, the only one that listens on a socket there; the log is hvc0's.
fn cloud_hypervisor(spec: &GuestSpec, paths: &Paths, program: &str) -> Vec<String> {
    let memory = match spec.memory {
        Memory::HugePages => "shared=on,hugepages=on,hugepage_size=2M,prefault=on",
        Memory::Pages => "shared=on",
        Memory::Private => "shared=off",
    };
    let mut argv = vec![program.to_owned()];
    argv.extend(arguments(&format!(
        "--kernel {kernel}
        --initramfs {initramfs}
        --cmdline console=hvc0 quiet {QUICK} {cmdline}
        --cpus boot=1
        --memory size={mib}M,{memory}
        --serial socket={agent}
        --console file={console}
        --api-socket path={control}",
        kernel = paths.kernel,
        initramfs = paths.initramfs,
        cmdline = spec.cmdline,
        mib = spec.memory_mib,
        agent = paths.agent,
        console = paths.console,
        control = paths.control,
    )));
    for socket in &spec.devices {
        argv.push("--user-device".into());
        argv.push(format!("socket={socket}"));
    }
    argv
}
