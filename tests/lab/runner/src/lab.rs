//! One run of a scenario: its folder, its time, its options, and the pair of hosts that most need.

use crate::cache::Cache;
use crate::guest::{Guest, GuestSpec, Vmm};
use crate::host::{Host, HostSpec, RUN_IN_HOST};
use crate::ntb::{Half, Ntb};
use crate::snapshot::{self, Both, Snapshot};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a foreign NTB leaves open, printed with every comparison of two snapshots.
const FOREIGN_NTB: &str = "a foreign NTB cannot be asked which of a host's memory it may reach: the \
    NTB's own IOMMU maps are not compared, all else is";

/// Names a build of `sublet` by which `daemon-replaced` replaces daemons, as an earlier release.
const OTHER_BUILD: &str = "SUBLET_LAB_OTHER";
/// The one that is built for that.
const NEXT_BUILD: &str = "sublet-next";

/// What the command line says beyond the scenario's name.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Sockets of an NTB that already listens.
    pub ntb_sockets: Option<(PathBuf, PathBuf)>,
    /// A cloud-hypervisor binary to run guests.
    pub vmm: Option<PathBuf>,
    /// Keep the scenario's folder even when all went well.
    pub keep: bool,
}

/// What a scenario works with.
pub struct Lab {
    /// From the command line.
    pub options: Options,
    /// What was installed.
    pub cache: Cache,
    /// The scenario's folder; hosts see it at [`RUN_IN_HOST`].
    pub dir: PathBuf,
    /// The zero of all stamps.
    pub since: Instant,
}

/// Two hosts and what lies between them. The NTB goes last: a host without it hangs at its end.
pub struct Pair {
    /// The lender.
    pub a: Host,
    /// The borrower.
    pub b: Host,
    /// None where a scenario has no cable.
    pub ntb: Option<Ntb>,
}

impl Lab {
    /// Makes the scenario's folder.
    pub fn new(options: Options, name: &str) -> Result<Self> {
        let cache = Cache::find()?;
        // Short, since Unix sockets lie in it.
        let dir = std::env::temp_dir().join(format!("sublet-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("bin"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let since = Instant::now();
        Ok(Lab {
            options,
            cache,
            dir,
            since,
        })
    }

    /// The NTB that the command line names, or our model with these options.
    pub fn ntb(&self, options: &[&str]) -> Result<Ntb> {
        match &self.options.ntb_sockets {
            Some((a, b)) => {
                println!("note: {FOREIGN_NTB}");
                Ok(Ntb::foreign(a.clone(), b.clone()))
            }
            None => self.cable("ntb", options),
        }
    }

    /// Our model; the name is of its files.
    pub fn cable(&self, name: &str, options: &[&str]) -> Result<Ntb> {
        Ntb::model(&self.cache, &self.dir, name, options, self.since)
    }

    /// Boots both hosts at once, the first with an NVMe to lend.
    pub fn boot_pair(&self, ntb: Option<Ntb>) -> Result<Pair> {
        let [a, b] = self.pair_specs(ntb.as_ref())?;
        self.boot(&a, &b, ntb)
    }

    /// What those two hosts are made of.
    pub fn pair_specs(&self, ntb: Option<&Ntb>) -> Result<[HostSpec; 2]> {
        let a = HostSpec::stock("a", &self.cache)?.lender();
        let b = HostSpec::stock("b", &self.cache)?.borrower();
        Ok(match ntb {
            Some(ntb) => [a.ntb(&ntb.socket_a), b.ntb(&ntb.socket_b)],
            None => [a, b],
        })
    }

    /// Boots any two hosts at once.
    pub fn boot(&self, a: &HostSpec, b: &HostSpec, ntb: Option<Ntb>) -> Result<Pair> {
        // QEMU dies with the thread that started it: both are started here.
        let (mut a, mut b) = (self.start_host(a)?, self.start_host(b)?);
        a.wait_ready()?;
        b.wait_ready()?;
        Ok(Pair { a, b, ntb })
    }

    /// Starts one host; it is ready after [`Host::wait_ready`].
    pub fn start_host(&self, spec: &HostSpec) -> Result<Host> {
        Host::start(spec, &self.cache, &self.dir, self.since)
    }

    /// The program that runs guests, put where a host sees it.
    pub fn vmm(&self) -> Result<Vmm> {
        let Some(path) = &self.options.vmm else {
            return Ok(Vmm::Qemu);
        };
        self.share_program(path, "vmm")?;
        Ok(Vmm::CloudHypervisor(format!("{RUN_IN_HOST}/bin/vmm")))
    }

    /// Copies one of the project's binaries into the hosts' share and gives its path there.
    pub fn share_binary(&self, name: &str) -> Result<String> {
        self.share_program(&self.cache.binary(name)?, name)?;
        Ok(format!("{RUN_IN_HOST}/bin/{name}"))
    }

    /// Another build of `sublet`: the one that `OTHER_BUILD` names, else the one that is built beside
    /// it, of the same sources.
    pub fn share_other_build(&self) -> Result<String> {
        let other = std::env::var_os(OTHER_BUILD).map(PathBuf::from);
        let from = other.map_or_else(|| self.cache.binary(NEXT_BUILD), Ok)?;
        self.share_program(&from, NEXT_BUILD)?;
        Ok(format!("{RUN_IN_HOST}/bin/{NEXT_BUILD}"))
    }

    fn share_program(&self, from: &Path, name: &str) -> Result<()> {
        let to = self.dir.join("bin").join(name);
        fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    }

    /// Boots a guest and waits for its agent.
    pub fn boot_guest(&self, spec: &GuestSpec, host: &Host) -> Result<Guest> {
        let guest = Guest::start(spec, host, &self.cache)?;
        guest
            .wait_ready()
            .with_context(|| format!("guest {}", spec.name))?;
        Ok(guest)
    }
}

impl Pair {
    /// Both hosts at rest: what later looks are compared with.
    pub fn snapshot(&self) -> Result<Both> {
        snapshot::both_at_rest(|| self.look())
    }

    /// Both hosts as they are now, with what the NTB may reach in each.
    pub fn look(&self) -> Result<Both> {
        let take = |host: &Host, half| {
            let mut snapshot = Snapshot::take(&host.agent)?;
            if let Some(ntb) = self.ntb.as_ref().filter(|ntb| ntb.is_model()) {
                snapshot.add("ntb_maps", ntb.maps(half)?);
            }
            Ok::<_, anyhow::Error>(snapshot)
        };
        Ok((take(&self.a, Half::A)?, take(&self.b, Half::B)?))
    }

    /// Both hosts are as they were: every scenario's last check.
    pub fn ensure_unchanged(&self, before: &Both) -> Result<&'static str> {
        snapshot::ensure_both_equal(before, || self.look())?;
        let foreign = self.ntb.as_ref().is_some_and(|ntb| !ntb.is_model());
        Ok(if foreign { FOREIGN_NTB } else { "" })
    }
}
