//! From what the file says to validated objects; every refusal has place, cause and mend.

use super::{
    BdfPattern, Config, ConfigError, FUNCTIONS_PER_DOMAIN_MAX, FUNCTIONS_PER_PORT_MAX,
    GUEST_MAPS_DEFAULT, GUEST_MAPS_MAX, KeeperConfig, Limits, PORTS_MAX, Peers, Policy, PortConfig,
    SOCKET_PATH_MAX, STATE_PATH_MAX, VMM_PEERS_MAX, WORKER_MESSAGES_PER_SECOND_MAX,
    error::{Places, nearest},
    file, parse_size,
};
use crate::daemon::vocabulary::BarMode;
use std::{ops::RangeInclusive, path::PathBuf, time::Duration};
use toml::Spanned;
use vfio_shim::model::Bdf;
use vfio_shim::path::limits::{INTERRUPTS_PER_SECOND_DEFAULT, INTERRUPTS_PER_SECOND_MAX};

const CONTROL_DEFAULT: &str = "/run/sublet/control.sock";
const SOCKETS_DEFAULT: &str = "/run/sublet";
const STATE_DEFAULT: &str = "/var/lib/sublet";
const KEEPER_FOLDER_DEFAULT: &str = "/run/sublet-keeper";
const KEEPER_USER_DEFAULT: &str = "sublet";
/// Room for the longest name of a socket in it.
const KEEPER_FOLDER_MAX: usize = SOCKET_PATH_MAX - 16;
const NAME_BYTES_MAX: usize = 64;
const HEARTBEAT_MS_DEFAULT: u64 = 250;
const LOST_AFTER_MS_DEFAULT: u64 = 1_500;
const HEARTBEAT_MS: RangeInclusive<i64> = 10..=60_000;
const LOST_AFTER_MS_MAX: i64 = 600_000;
const LEASE_TTL_MS_DEFAULT: u64 = 60_000;
/// Long enough for a reset at the path's opening, and a day.
const LEASE_TTL_MS: RangeInclusive<i64> = 20_000..=86_400_000;
const FUNCTIONS_PER_PORT_DEFAULT: u32 = 64;
/// A worker answers its VMM with one message each, and a VMM waits for most of the answers.
const WORKER_MESSAGES_PER_SECOND_DEFAULT: u32 = 50_000;
/// A window is cut into huge pages of 2 MiB, and the first of them holds the mailbox.
const WINDOW_STEP_BYTES: u64 = 2 << 20;

type Result<T> = std::result::Result<T, ConfigError>;

pub(super) fn config(at: &Places<'_>, file: file::File) -> Result<Config> {
    let node_id = ranged(at, "id", &file.node.id, 0..=0xffff)? as u16;
    let node_name = name(at, "name", file.node.name)?;
    let daemon = file.daemon;
    let socket = |key, said, default| absolute(at, key, said, default, SOCKET_PATH_MAX);
    let control = socket("control", daemon.control, CONTROL_DEFAULT)?;
    let sockets = socket("sockets", daemon.sockets, SOCKETS_DEFAULT)?;
    let state = absolute(at, "state", daemon.state, STATE_DEFAULT, STATE_PATH_MAX)?;
    let keeper = keeper(at, file.keeper)?;
    let ports = ports(at, file.port, node_id)?;
    let limits = limits(at, file.limits)?;
    let policy = policy(at, file.policy)?;
    Ok(Config {
        node_id,
        node_name,
        control,
        sockets,
        state,
        keeper,
        ports,
        limits,
        policy,
    })
}

fn keeper(at: &Places<'_>, said: file::Keeper) -> Result<KeeperConfig> {
    let folder = said.folder;
    Ok(KeeperConfig {
        folder: absolute(
            at,
            "folder",
            folder,
            KEEPER_FOLDER_DEFAULT,
            KEEPER_FOLDER_MAX,
        )?,
        user: match said.user {
            Some(user) => name(at, "user", user)?,
            None => KEEPER_USER_DEFAULT.to_owned(),
        },
    })
}

fn ports(at: &Places<'_>, said: Vec<file::Port>, own: u16) -> Result<Vec<PortConfig>> {
    if said.is_empty() {
        let end = at.text.len();
        let cause = "there is no [[port]], so this host could neither lend nor borrow";
        return Err(at.error(end..end, cause, "add a [[port]] for each NTB function"));
    }
    let mut ports: Vec<PortConfig> = Vec::new();
    for one in said {
        let (name_at, bdf_at) = (one.name.span(), one.bdf.span());
        if ports.len() == PORTS_MAX {
            let cause = format!("there are more than {PORTS_MAX} ports");
            return Err(at.error(name_at, cause, "remove some"));
        }
        let port = port(at, one, own)?;
        if ports.iter().any(|other| other.name == port.name) {
            let cause = format!("a second port is named `{}`", port.name);
            return Err(at.error(name_at, cause, "give each port a name of its own"));
        }
        if let Some(other) = ports.iter().find(|other| other.bdf == port.bdf) {
            let cause = format!("{} is the port `{}` already", port.bdf, other.name);
            return Err(at.error(bdf_at, cause, "name each NTB function once"));
        }
        ports.push(port);
    }
    Ok(ports)
}

fn port(at: &Places<'_>, said: file::Port, own: u16) -> Result<PortConfig> {
    let bdf: Bdf = (said.bdf.get_ref().parse())
        .map_err(|e| at.error(said.bdf.span(), "`bdf` is malformed", format!("{e}")))?;
    let heartbeat_ms = match &said.heartbeat_ms {
        Some(ms) => ranged(at, "heartbeat_ms", ms, HEARTBEAT_MS)?,
        None => HEARTBEAT_MS_DEFAULT,
    };
    let least = 2 * heartbeat_ms as i64;
    let lost_after_ms = match (&said.lost_after_ms, &said.heartbeat_ms) {
        (Some(ms), _) => ranged(at, "lost_after_ms", ms, least..=LOST_AFTER_MS_MAX)?,
        // The default goes with the default heartbeat; a slower one must bring its own.
        (None, Some(ms)) if LOST_AFTER_MS_DEFAULT < 2 * heartbeat_ms => {
            let cause = format!(
                "with `heartbeat_ms` {heartbeat_ms} the default `lost_after_ms` of {LOST_AFTER_MS_DEFAULT} is less than two heartbeats"
            );
            return Err(at.error(
                ms.span(),
                cause,
                format!("add lost_after_ms = {}", 6 * heartbeat_ms),
            ));
        }
        (None, _) => LOST_AFTER_MS_DEFAULT,
    };
    Ok(PortConfig {
        name: name(at, "name", said.name)?,
        bdf,
        peers: choice(at, "peers", &said.peers, &[("cable", Peers::Cable)])?,
        peer_node: peer_node(at, said.peer_node.as_ref(), own)?,
        trust_domain: name(at, "trust_domain", said.trust_domain)?,
        heartbeat: Duration::from_millis(heartbeat_ms),
        lost_after: Duration::from_millis(lost_after_ms),
        window_limit_bytes: window_limit(at, said.window_limit_bytes)?,
        trust_vmm: said.trust_vmm,
    })
}

fn peer_node(at: &Places<'_>, said: Option<&Spanned<i64>>, own: u16) -> Result<Option<u16>> {
    let Some(said) = said else { return Ok(None) };
    let node = ranged(at, "peer_node", said, 0..=0xffff)? as u16;
    if node == own {
        let cause = format!("`peer_node` is {own}, which is this host");
        return Err(at.error(
            said.span(),
            cause,
            "write the `id` of the host at the far end",
        ));
    }
    Ok(Some(node))
}

fn window_limit(at: &Places<'_>, said: Option<Spanned<file::Size>>) -> Result<Option<u64>> {
    let Some(said) = said else { return Ok(None) };
    let bytes = size(at, "window_limit_bytes", &said)?;
    if bytes < 2 * WINDOW_STEP_BYTES || bytes % WINDOW_STEP_BYTES != 0 {
        let cause = format!("`window_limit_bytes` is {bytes}");
        return Err(at.error(said.span(), cause, "write a multiple of 2M from 4M on"));
    }
    Ok(Some(bytes))
}

fn limits(at: &Places<'_>, said: file::Limits) -> Result<Limits> {
    let count = |key, value: &Option<Spanned<i64>>, default: u32, max: u32| match value {
        Some(value) => ranged(at, key, value, 1..=i64::from(max)).map(|n| n as u32),
        None => Ok(default),
    };
    let functions = &said.functions_per_port;
    Ok(Limits {
        functions_per_port: count(
            "functions_per_port",
            functions,
            FUNCTIONS_PER_PORT_DEFAULT,
            FUNCTIONS_PER_PORT_MAX,
        )?,
        guest_mapped_bytes: match &said.guest_mapped_bytes {
            Some(bytes) => Some(size(at, "guest_mapped_bytes", bytes)?),
            None => None,
        },
        functions_per_domain: count(
            "functions_per_domain",
            &said.functions_per_domain,
            FUNCTIONS_PER_DOMAIN_MAX,
            FUNCTIONS_PER_DOMAIN_MAX,
        )?,
        worker_messages_per_second: count(
            "worker_messages_per_second",
            &said.worker_messages_per_second,
            WORKER_MESSAGES_PER_SECOND_DEFAULT,
            WORKER_MESSAGES_PER_SECOND_MAX,
        )?,
        interrupts_per_second: count(
            "interrupts_per_second",
            &said.interrupts_per_second,
            INTERRUPTS_PER_SECOND_DEFAULT,
            INTERRUPTS_PER_SECOND_MAX,
        )?,
        guest_maps: count(
            "guest_maps",
            &said.guest_maps,
            GUEST_MAPS_DEFAULT,
            GUEST_MAPS_MAX,
        )?,
        lease_ttl: Duration::from_millis(match &said.lease_ttl_ms {
            Some(ms) => ranged(at, "lease_ttl_ms", ms, LEASE_TTL_MS)?,
            None => LEASE_TTL_MS_DEFAULT,
        }),
    })
}

fn policy(at: &Places<'_>, said: file::Policy) -> Result<Policy> {
    let pattern = |entry: &Spanned<String>| {
        (entry.get_ref().parse::<BdfPattern>()).map_err(|e| {
            at.error(
                entry.span(),
                "`allow` has a malformed entry",
                format!("{e}"),
            )
        })
    };
    let bars = [("trapped", BarMode::Trapped), ("mapped", BarMode::Mapped)];
    Ok(Policy {
        allow: said.allow.iter().map(pattern).collect::<Result<_>>()?,
        memory_check: match &said.memory_check {
            Some(word) => choice(at, "memory_check", word, &[("on", true), ("off", false)])?,
            None => true,
        },
        bars: match &said.bars {
            Some(word) => choice(at, "bars", word, &bars)?,
            None => BarMode::Trapped,
        },
        vmm_uids: ids(at, "vmm_uids", &said.vmm_uids)?,
        vmm_gids: ids(at, "vmm_gids", &said.vmm_gids)?,
    })
}

/// Numbers of users or groups; the last one of all is the kernel's for none.
fn ids(at: &Places<'_>, key: &str, said: &[Spanned<i64>]) -> Result<Vec<u32>> {
    if let Some(over) = said.get(VMM_PEERS_MAX) {
        let cause = format!("`{key}` has more than {VMM_PEERS_MAX} entries");
        return Err(at.error(over.span(), cause, "give the VMMs a group in common"));
    }
    let id = |one| ranged(at, key, one, 0..=i64::from(u32::MAX) - 1).map(|id| id as u32);
    said.iter().map(id).collect()
}

fn ranged(
    at: &Places<'_>,
    key: &str,
    value: &Spanned<i64>,
    range: RangeInclusive<i64>,
) -> Result<u64> {
    let number = *value.get_ref();
    match u64::try_from(number) {
        Ok(unsigned) if range.contains(&number) => Ok(unsigned),
        _ => {
            let mend = format!("write {} to {}", range.start(), range.end());
            Err(at.error(
                value.span(),
                format!("`{key}` is {number}, out of range"),
                mend,
            ))
        }
    }
}

fn size(at: &Places<'_>, key: &str, value: &Spanned<file::Size>) -> Result<u64> {
    let malformed = |mend: String| at.error(value.span(), format!("`{key}` is malformed"), mend);
    match value.get_ref() {
        file::Size::Number(number) => u64::try_from(*number)
            .map_err(|_| malformed(format!("{number} is negative: write a number of bytes"))),
        file::Size::Text(text) => parse_size(text).map_err(|e| malformed(e.to_string())),
    }
}

fn name(at: &Places<'_>, key: &str, value: Spanned<String>) -> Result<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let text = value.get_ref();
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.chars().all(good) {
        let cause = format!("`{key}` is {text:?}");
        let mend = format!("write 1 to {NAME_BYTES_MAX} letters, digits, `.`, `_` or `-`");
        return Err(at.error(value.span(), cause, mend));
    }
    Ok(value.into_inner())
}

fn choice<T: Copy>(
    at: &Places<'_>,
    key: &str,
    value: &Spanned<String>,
    known: &[(&str, T)],
) -> Result<T> {
    let said = value.get_ref();
    if let Some((_, chosen)) = known.iter().find(|(word, _)| word == said) {
        return Ok(*chosen);
    }
    let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
    let mend = format!(
        "write `{}`; the nearest is `{}`",
        words.join("` or `"),
        nearest(said, &words).unwrap_or_default()
    );
    Err(at.error(value.span(), format!("`{key}` is {said:?}"), mend))
}

fn absolute(
    at: &Places<'_>,
    key: &str,
    said: Option<Spanned<String>>,
    default: &str,
    bytes_max: usize,
) -> Result<PathBuf> {
    let Some(said) = said else {
        return Ok(default.into());
    };
    let path = PathBuf::from(said.get_ref());
    if !path.is_absolute() || said.get_ref().len() > bytes_max {
        let cause = format!("`{key}` is {:?}", said.get_ref());
        let mend = format!("write an absolute path of at most {bytes_max} bytes");
        return Err(at.error(said.span(), cause, mend));
    }
    Ok(path)
}
