//! A host (L1): QEMU under TCG with an IOMMU, a lender's NVMe where wanted, and an NTB.

use crate::agent::Agent;
use crate::cache::{Cache, Kernel};
use crate::initramfs::{Initramfs, PORT_NAME, Port};
use crate::log::Log;
use crate::program::{Program, arguments};
use crate::tsc;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// What every host loads.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "vfio",
    "vfio_iommu_type1",
    "vfio-pci",
];
/// For every kernel here: what costs an emulated processor time and tells these tests nothing.
/// `no_timer_check`, since on a busy machine Linux finds that its timer does not tick and panics.
pub const QUICK: &str = "panic=-1 mitigations=off audit=0 cryptomgr.notests=1 no_timer_check";
/// Two cores under TCG bring a host up in 6 to 8 s; a machine at work on ten other things, in 100.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// While a host boots, its QEMU is looked after this often.
const LOOK_AFTER_QEMU: Duration = Duration::from_secs(3);
/// Two guests of 128 MiB, and room for their firmware's rounding.
const GUEST_HUGE_PAGES: u32 = 160;
const NVME_BYTES: u64 = 64 << 20;
/// Queues and interrupts that the physical function can give to its VFs. No shadow doorbells, which
/// real controllers seldom have: QEMU reads them in the guest's memory, and where that reads as ones,
/// as behind a dead link, it goes round its queues without end and the host's processors get no turn.
const NVME_RESOURCES: &str =
    "sriov_max_vfs=4,sriov_vq_flexible=8,sriov_vi_flexible=4,max_ioqpairs=12,msix_qsize=9,dbcs=off";

/// Where a host sees the scenario's folder.
pub const RUN_IN_HOST: &str = "/lab/run";
/// A port's end of the NTB.
pub const NTB_BDF: &str = "0000:02:00.0";
/// The lender's physical function.
pub const PF_BDF: &str = "0000:01:00.0";
/// Its first virtual function.
pub const VF_BDF: &str = "0000:01:00.1";

/// What a host is made of.
pub struct HostSpec {
    /// Names its log and its sockets.
    pub name: String,
    /// The kernel, and the modules it loads: `name` or `name key=value`.
    pub kernel: Kernel,
    /// See [`HostSpec::stock`] for the usual ones.
    pub modules: Vec<String>,
    /// Modules built outside of Debian, with their parameters.
    pub built_modules: Vec<(PathBuf, String)>,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Its RAM, taken as it is used.
    pub memory_mib: u32,
    /// How many it has.
    pub processors: u32,
    /// Of 2 MiB, for guests; they take a second of its boot to clear.
    pub huge_pages: u32,
    /// Whether it has the NVMe with SR-IOV.
    pub lends: bool,
    /// The vfio-user socket of its half of the NTB.
    pub ntb: Option<PathBuf>,
    /// More QEMU arguments.
    pub arguments: Vec<String>,
}

impl HostSpec {
    /// A host with Debian's newest kernel and what every host has.
    pub fn stock(name: &str, cache: &Cache) -> Result<Self> {
        Ok(HostSpec {
            name: name.to_owned(),
            kernel: cache.kernel()?,
            modules: MODULES.map(str::to_owned).to_vec(),
            built_modules: Vec::new(),
            cmdline: String::new(),
            memory_mib: 3 << 10,
            processors: 2,
            huge_pages: 0,
            lends: false,
            ntb: None,
            arguments: Vec::new(),
        })
    }

    /// Gives it an NVMe with SR-IOV and the driver for it.
    pub fn lender(mut self) -> Self {
        self.lends = true;
        self.modules.push("nvme".to_owned());
        self
    }

    /// Gives it nested KVM, and memory for guests.
    pub fn borrower(mut self) -> Self {
        self.huge_pages = GUEST_HUGE_PAGES;
        self.modules.push("kvm-amd".to_owned());
        self
    }

    /// For a host with nothing to do but one thing.
    pub fn small(mut self) -> Self {
        (self.memory_mib, self.processors) = (768, 1);
        self
    }

    /// Plugs it into its half of the NTB.
    pub fn ntb(mut self, socket: &Path) -> Self {
        self.ntb = Some(socket.to_owned());
        self
    }
}

/// A running host; dropping it ends it.
pub struct Host {
    /// From the spec.
    pub name: String,
    /// Its agent.
    pub agent: Agent,
    /// Its QEMU, whose log is also the serial console.
    pub qemu: Program,
    /// The cache folder as it sees it.
    pub cache: PathBuf,
    /// The scenario's folder, outside.
    pub dir: PathBuf,
}

impl Host {
    /// Starts QEMU; the host is ready after [`Host::wait_ready`].
    pub fn start(spec: &HostSpec, cache: &Cache, dir: &Path, since: Instant) -> Result<Self> {
        let initramfs = dir.join(format!("{}.cpio", spec.name));
        Initramfs {
            kernel: &spec.kernel,
            modules: spec.modules.clone(),
            files: Vec::new(),
            built_modules: spec.built_modules.clone(),
            early: String::new(),
            setup: setup(),
            port: Port::Virtio,
        }
        .write(cache, &initramfs)?;
        let socket = dir.join(format!("{}.agent", spec.name));
        let mut argv = Cache::qemu(&cache.root);
        argv.extend(machine(spec, cache, dir, &initramfs, &socket));
        if spec.lends {
            argv.extend(lent_nvme(&spec.name, dir)?);
        }
        if let Some(ntb) = &spec.ntb {
            argv.push("-device".into());
            argv.push(vfio_user_device(&ntb.display().to_string(), Some("rp1")));
        }
        argv.extend(spec.arguments.iter().cloned());
        let log = Log::new(dir.join(format!("host-{}.log", spec.name)), since);
        let mut qemu = Program::start(&format!("host {}", spec.name), &argv, log)?;
        let agent = connect(&socket, &mut qemu)?;
        Ok(Host {
            name: spec.name.clone(),
            agent,
            qemu,
            cache: PathBuf::from(Cache::IN_HOST),
            dir: dir.to_owned(),
        })
    }

    /// Waits for its agent.
    pub fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_TIMEOUT;
        loop {
            let ready = self.agent.wait_ready(LOOK_AFTER_QEMU);
            self.qemu.ensure_alive()?;
            match ready {
                Err(_) if Instant::now() < deadline => {}
                ready => return ready.with_context(|| format!("host {}", self.name)),
            }
        }
    }

    /// Power goes, without a word to anybody.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// A path of the scenario's folder as this host sees it.
    pub fn shared(&self, name: &str) -> String {
        format!("{RUN_IN_HOST}/{name}")
    }
}

/// The device argument for a vfio-user server's socket.
pub fn vfio_user_device(socket: &str, bus: Option<&str>) -> String {
    let mut device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket },
    });
    if let Some(bus) = bus {
        device["bus"] = bus.into();
    }
    device.to_string()
}

fn setup() -> String {
    format!(
        "mount -t hugetlbfs huge /dev/hugepages\nmount -t tracefs trace /sys/kernel/tracing\n\
         mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose cache {cache}\n\
         mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576 run {RUN_IN_HOST}\n",
        cache = Cache::IN_HOST
    )
}

fn machine(
    spec: &HostSpec,
    cache: &Cache,
    dir: &Path,
    initramfs: &Path,
    socket: &Path,
) -> Vec<String> {
    // The addresses of the root ports give what is behind them the bus numbers 1 and 2.
    arguments(&format!(
        "-M q35,kernel-irqchip=split,memory-backend=m
        -accel tcg,thread=multi
        -cpu max
        -smp {processors}
        -m {memory_mib}M
        -object memory-backend-memfd,id=m,size={memory_mib}M,share=on
        -nodefaults
        -display none
        -monitor none
        -nic none
        -no-reboot
        -d cpu_reset
        -D {resets}
        -serial stdio
        -kernel {kernel}
        -initrd {initramfs}
        -append console=ttyS0 {QUICK} {tsc} intel_iommu=on iomem=relaxed hugepages={huge_pages} {cmdline}
        -device intel-iommu,intremap=on,caching-mode=on
        -device pcie-root-port,id=rp0,slot=1,addr=5
        -device pcie-root-port,id=rp1,slot=2,addr=6
        -device virtio-serial-pci,addr=8
        -chardev socket,id=agent,path={socket},server=on,wait=off
        -device virtserialport,chardev=agent,name={PORT_NAME}
        -virtfs local,path={cache},mount_tag=cache,security_model=none,readonly=on
        -virtfs local,path={dir},mount_tag=run,security_model=none",
        processors = spec.processors,
        memory_mib = spec.memory_mib,
        // The registers at each reset of a processor: all there is to learn of a host that ends
        // without a word.
        resets = dir.join(format!("host-{}-resets.log", spec.name)).display(),
        kernel = spec.kernel.image.display(),
        initramfs = initramfs.display(),
        huge_pages = spec.huge_pages,
        tsc = tsc::parameters(),
        cmdline = spec.cmdline,
        socket = socket.display(),
        cache = cache.root.display(),
        dir = dir.display(),
    ))
}

fn lent_nvme(name: &str, dir: &Path) -> Result<Vec<String>> {
    let image = dir.join(format!("{name}.nvme"));
    File::create(&image)
        .and_then(|file| file.set_len(NVME_BYTES))
        .with_context(|| format!("cannot make {}", image.display()))?;
    Ok(arguments(&format!(
        "-drive if=none,id=n0,file={image},format=raw
        -device nvme-subsys,id=ss0
        -device nvme,serial=lent,subsys=ss0,bus=rp0,{NVME_RESOURCES}
        -device nvme-ns,drive=n0,nsid=1,shared=on",
        image = image.display(),
    )))
}

/// QEMU makes the socket before it starts the machine, but not before it runs.
fn connect(socket: &Path, qemu: &mut Program) -> Result<Agent> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    loop {
        match Agent::connect(socket) {
            Ok(agent) => return Ok(agent),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => qemu.ensure_alive()?,
        }
        thread::sleep(Duration::from_millis(20));
    }
}
