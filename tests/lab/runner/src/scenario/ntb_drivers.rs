//! Scenario `ntb-drivers`: Linux's own NTB drivers bind to the model in two hosts and talk over it.
//!
//! It keeps the model honest: `ntb_hw_intel`, `ntb_pingpong` (doorbells, scratchpads, interrupts),
//! `ntb_perf` and `ntb_tool` (the memory windows) know nothing of this project. Each variation of the
//! device is run.

use super::{Scenario, When};
use crate::agent::Agent;
use crate::cache::{Cache, Kernel};
use crate::check::Checks;
use crate::host::{HostSpec, NTB_BDF};
use crate::lab::{Lab, Pair};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Some checks for each variation, and three that only the first has.
pub const SCENARIO: Scenario = Scenario {
    name: "ntb-drivers",
    checks: 7 * VARIATIONS.len() + 3,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// A device that the drivers must take.
struct Variation {
    name: &'static str,
    /// Of the model.
    options: &'static [&'static str],
}

const VARIATIONS: [Variation; 3] = [
    Variation {
        name: "347e",
        options: &[],
    },
    Variation {
        name: "0db4, windows of 4 MiB and 256 MiB, INTVEC reversed, link 1.5 s late",
        options: &[
            "--device-id",
            "0db4",
            "--bar2-bytes-a",
            "4194304",
            "--bar2-bytes-b",
            "268435456",
            "--bar4-bytes",
            "2097152",
            "--intvec-reset",
            "reverse",
            "--late-link-up",
            "1500",
        ],
    },
    Variation {
        name: "347e, windows of 64 KiB, INTVEC zero",
        options: &[
            "--bar2-bytes-a",
            "65536",
            "--bar2-bytes-b",
            "65536",
            "--bar4-bytes",
            "65536",
            "--intvec-reset",
            "zero",
        ],
    },
];

const HW: &str = "/sys/kernel/debug/ntb_hw_intel";
const PINGPONG: &str = "/sys/kernel/debug/ntb_pingpong";
const PERF: &str = "/sys/kernel/debug/ntb_perf";
const TOOL: &str = "/sys/kernel/debug/ntb_tool";
const PINGS: u64 = 10;
const PATIENCE: Duration = Duration::from_secs(30);
const PERF_PATIENCE: Duration = Duration::from_secs(5);
/// Each host sends two: the size of its buffer, and where it lies.
const PERF_COMMANDS: usize = 4;
/// Shell: `b` is where the registers lie; hosts allow /dev/mem.
const BAR0: &str = "b=$(sed -n '1s/ .*//p' /sys/bus/pci/devices/0000:02:00.0/resource)";

/// The kernel that the drivers were built for, and the modules.
struct Built {
    kernel: Kernel,
    modules: PathBuf,
}

impl Built {
    /// What `ntb-modules.sh` left.
    fn find(cache: &Cache) -> Result<Self> {
        let dir = cache.root.join("ntb");
        let version = fs::read_to_string(dir.join("version"))
            .context("the NTB modules are not built: run tests/run --install")?;
        let modules = dir.join("modules");
        let kernel = Kernel {
            version: version.trim().to_owned(),
            image: dir.join("vmlinuz"),
            modules: modules.clone(),
        };
        Ok(Built { kernel, modules })
    }

    fn host(&self, name: &str, cache: &Cache) -> Result<HostSpec> {
        let mut spec = HostSpec::stock(name, cache)?;
        spec.kernel = self.kernel.clone();
        // That kernel has built in what a host of this scenario needs.
        spec.modules.clear();
        spec.built_modules = ["ntb", "ntb_hw_intel"]
            .map(|module| (self.modules.join(format!("{module}.ko")), String::new()))
            .to_vec();
        Ok(spec)
    }

    /// Loads a client of the NTB bus; the bus gives its device to one client only.
    fn load(&self, agent: &Agent, module: &str, parameters: &str) -> Result<()> {
        let path = format!("/tmp/{module}.ko");
        agent.put(&path, &fs::read(self.modules.join(format!("{module}.ko")))?)?;
        agent
            .sh(&format!("insmod {path} {parameters}"))
            .with_context(|| module.to_owned())?;
        Ok(())
    }
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let built = Built::find(&lab.cache)?;
    for (index, variation) in VARIATIONS.iter().enumerate() {
        let ntb = lab.ntb(variation.options)?;
        let device = if ntb.is_model() {
            variation.name
        } else {
            "a foreign NTB, as it is"
        };
        println!("device: {device}");
        let a = built.host("a", &lab.cache)?.ntb(&ntb.socket_a);
        let b = built.host("b", &lab.cache)?.ntb(&ntb.socket_b);
        let mut pair = None;
        checks.must("ntb_hw_intel binds on both hosts", || {
            let booted = lab.boot(&a, &b, Some(ntb))?;
            for host in [&booted.a, &booted.b] {
                bound(&host.agent).with_context(|| format!("host {}", host.name))?;
            }
            pair = Some(booted);
            Ok(&built.kernel.version)
        })?;
        let Some(pair) = pair else { return Ok(()) };
        ping_pong(&built, &pair, checks)?;
        if index == 0 {
            disturb(&pair, checks);
        }
        unload(&pair, "ntb_pingpong")?;
        perf(&built, &pair, checks)?;
        checks.check("words cross each window of ntb_tool both ways", || {
            tool(&built, &pair)
        });
    }
    Ok(())
}

fn hosts(pair: &Pair) -> [(&str, &Agent); 2] {
    [("a", &pair.a.agent), ("b", &pair.b.agent)]
}

fn bound(agent: &Agent) -> Result<()> {
    agent.sh("mkdir -p /sys/kernel/debug; mount -t debugfs debug /sys/kernel/debug")?;
    let driver = agent.sh(&format!("readlink /sys/bus/pci/devices/{NTB_BDF}/driver"));
    let log = || {
        agent
            .sh("dmesg | grep -i ntb | tail -n 5")
            .unwrap_or_default()
    };
    let driver = driver.with_context(log)?;
    ensure!(
        driver.ends_with("/ntb_hw_intel"),
        "driver {driver}: {}",
        log()
    );
    Ok(())
}

fn load_ping_pong(built: &Built, pair: &Pair) -> Result<()> {
    for (_, host) in hosts(pair) {
        built.load(host, "ntb_pingpong", "delay_ms=20")?;
    }
    Ok(())
}

/// Both counts after at least [`PINGS`] more than now.
fn more_pings(pair: &Pair) -> Result<String> {
    let mut words = Vec::new();
    for (name, host) in hosts(pair) {
        let before = pings(host)?;
        let file = format!("{PINGPONG}/{NTB_BDF}/count");
        let script = format!("[ $(cat {file}) -ge {} ]", before + PINGS);
        host.wait_until(&script, PATIENCE)
            .with_context(|| format!("host {name} counts {before} and hardly more"))?;
        words.push(format!("{name} {before} to {}", pings(host)?));
    }
    Ok(words.join(", "))
}

fn pings(host: &Agent) -> Result<u64> {
    let count = host.text(&format!("{PINGPONG}/{NTB_BDF}/count"))?;
    count.parse().with_context(|| format!("`{count}`"))
}

fn link_is(host: &Agent, state: &str) -> Result<()> {
    let script = format!("grep -q '^Link Status -[[:space:]]*{state}$' {HW}/{NTB_BDF}/info");
    host.wait_until(&script, PATIENCE)
        .with_context(|| format!("the link is not {state}"))?;
    Ok(())
}

fn ping_pong(built: &Built, pair: &Pair, checks: &mut Checks) -> Result<()> {
    checks.must("the link comes up in both drivers", || {
        load_ping_pong(built, pair)?;
        for (_, host) in hosts(pair) {
            link_is(host, "Up")?;
        }
        Ok("")
    })?;
    checks.check("ntb_pingpong counts on both hosts", || more_pings(pair));
    Ok(())
}

/// What only the model can be asked for; another NTB passes by saying so.
fn disturb(pair: &Pair, checks: &mut Checks) {
    let model = pair.ntb.as_ref().filter(|ntb| ntb.is_model());
    const FOREIGN: &str = "not asked of a foreign NTB";
    checks.check("without doorbells ntb_pingpong stands still", || {
        let Some(ntb) = model else {
            return Ok(FOREIGN.to_owned());
        };
        ntb.ask(&json!({ "op": "fault", "name": "drop-doorbells" }))?;
        // One ping may have been under way to each host; then nothing wakes them any more.
        let stands = |host: &Agent| {
            let file = format!("{PINGPONG}/{NTB_BDF}/count");
            host.wait_until(
                &format!("n=$(cat {file}); sleep 1; [ $(cat {file}) = $n ]"),
                PATIENCE,
            )
        };
        for (_, host) in hosts(pair) {
            stands(host)?;
        }
        let stood = pings(&pair.a.agent)?;
        ensure!(
            more_pings_within_a_second(pair)? == 0,
            "it goes on from {stood}"
        );
        ntb.ask(&json!({ "op": "fault", "name": null }))?;
        Ok(format!("at {stood}"))
    });
    checks.check(
        "a link that flaps is seen down and up by both drivers",
        || {
            let Some(ntb) = model else {
                return Ok(FOREIGN.to_owned());
            };
            ntb.ask(&json!({ "op": "link", "up": false }))?;
            for (_, host) in hosts(pair) {
                link_is(host, "Down")?;
            }
            ntb.ask(&json!({ "op": "link", "up": true }))?;
            for (_, host) in hosts(pair) {
                link_is(host, "Up")?;
            }
            ntb.ask(&json!({ "op": "flap", "ms": 300 }))?;
            Ok(String::new())
        },
    );
    // The event of the link is what starts it anew: no module is loaded again.
    checks.check("ntb_pingpong goes on after the flap", || more_pings(pair));
}

fn more_pings_within_a_second(pair: &Pair) -> Result<u64> {
    let count = || -> Result<u64> { Ok(pings(&pair.a.agent)? + pings(&pair.b.agent)?) };
    let before = count()?;
    pair.a.agent.sh("sleep 1")?;
    Ok(count()? - before)
}

/// 64 KiB each way: a trapped window is slow.
fn perf(built: &Built, pair: &Pair, checks: &mut Checks) -> Result<()> {
    checks.must("both ntb_perf agree on their buffers", || {
        introduce(built, pair)
    })?;
    for (name, host) in hosts(pair) {
        checks.check(&format!("ntb_perf writes from host {name}"), || {
            let run = format!("{PERF}/{NTB_BDF}/run");
            let report = host.sh(&format!("echo 0 > {run}; cat {run}"))?;
            let line = report.lines().find(|line| line.contains("MBytes/s"));
            let line = line.with_context(|| format!("no bandwidth in: {report}"))?;
            ensure!(line.contains(" 65536 bytes "), "{line}");
            Ok(line.trim().to_owned())
        });
    }
    unload(pair, "ntb_perf")
}

/// Loads `ntb_perf` on both hosts and waits until each knows the other's buffer.
///
/// The driver clears a doorbell before it looks whether its link is up, and then forgets the
/// command: where a host takes the doorbell's interrupt before the link's (a busy machine is
/// enough), neither side goes on, the command unread in its scratchpad. Its own fault, on any
/// NTB: exactly then the doorbell is rung again, and how often is told.
fn introduce(built: &Built, pair: &Pair) -> Result<String> {
    for (_, host) in hosts(pair) {
        let parameters = "max_mw_size=65536 chunk_order=12 total_order=16";
        built.load(host, "ntb_perf", parameters)?;
    }
    let known = format!("grep -q 'Out buffer xlat 0x0*[1-9a-f]' {PERF}/{NTB_BDF}/info");
    for lost in 0..PERF_COMMANDS {
        let ready = hosts(pair).map(|(_, host)| host.wait_until(&known, PERF_PATIENCE).is_ok());
        if ready == [true; 2] {
            return Ok(format!("{lost} doorbells rung again"));
        }
        let [(_, host_a), (_, host_b)] = hosts(pair);
        let mut any = false;
        // The bell of a host is the one of its port number.
        for (host, peer, bell) in [(host_a, host_b, 0), (host_b, host_a, 1)] {
            if command_unread(host)? {
                any = true;
                peer.sh(&format!(
                    "{BAR0}; devmem $((b + {})) 32 1",
                    0x100 + 4 * bell
                ))?;
            }
        }
        ensure!(any, "ntb_perf knows no buffer, and no command is unread");
    }
    bail!("more commands were lost than there are")
}

/// Whether a command of `ntb_perf` lies in a scratchpad although its doorbell was taken.
fn command_unread(host: &Agent) -> Result<bool> {
    let script = format!("{BAR0}; for o in 0x40 0x80 0x8c; do devmem $((b + o)) 32; done");
    let seen = host.sh(&script)?;
    let words: Vec<&str> = seen.lines().collect();
    let [status, command_0, command_1] = words[..] else {
        bail!("devmem said {seen}");
    };
    let none = "0xFFFFFFFF";
    Ok(status == "0x00000000" && (command_0 != none || command_1 != none))
}

fn unload(pair: &Pair, module: &str) -> Result<()> {
    for (_, host) in hosts(pair) {
        host.sh(&format!("rmmod {module}"))?;
    }
    Ok(())
}

/// Each host opens both windows to a buffer of its own, and the other writes a word through each.
/// The last client: Linux 6.12 oopses when `ntb_tool` is unloaded (it removes its files twice).
fn tool(built: &Built, pair: &Pair) -> Result<String> {
    let dir = format!("{TOOL}/{NTB_BDF}");
    for (_, host) in hosts(pair) {
        built.load(host, "ntb_tool", "")?;
        host.sh(&format!("echo Y > {dir}/link"))?;
    }
    let [(a, host_a), (b, host_b)] = hosts(pair);
    for (from, to, name) in [(host_a, host_b, a), (host_b, host_a, b)] {
        link_is(to, "Up")?;
        for window in [0, 1] {
            let word = format!("from-{name}-by-window-{window}");
            to.sh(&format!("echo 8192 > {dir}/peer0/mw_trans{window}"))?;
            from.sh(&format!(
                "echo 0:8192 > {dir}/peer0/peer_mw_trans{window}; echo {word} > {dir}/peer0/peer_mw{window}"
            ))?;
            let count = word.len();
            for (host, file) in [(to, "mw"), (from, "peer_mw")] {
                let seen = host.sh(&format!("head -c {count} {dir}/peer0/{file}{window}"))?;
                ensure!(seen == word, "{file}{window} has `{seen}`, not `{word}`");
            }
        }
    }
    Ok("2 windows".to_owned())
}
