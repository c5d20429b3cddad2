//! The configuration's samples are accepted, and every kind of mistake is told by its exact words.

use super::*;

const GOOD: &str = r#"[node]
id = 4
name = "a"

[[port]]
name = "ntb0"
bdf = "02:00.0"
peers = "cable"
trust_domain = "lab"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("s.toml"), text)
}

fn refusal(text: &str) -> String {
    parse(text).expect_err("refused").to_string()
}

fn sample(name: &str) -> Config {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/lab/config");
    Config::load(&root.join(name)).expect("the sample is right")
}

#[test]
fn the_labs_samples_are_accepted() {
    let (a, b) = (sample("a.toml"), sample("b.toml"));
    assert_eq!((a.node_id, b.node_id), (4, 8));
    assert_eq!(a.ports[0].lost_after, Duration::from_secs(10));
    assert_eq!(a.ports[0].window_limit_bytes, Some(4 << 30));
    assert!(a.may_lend("01:00.1".parse().unwrap()));
    assert!(!b.may_lend("01:00.1".parse().unwrap()));
}

#[test]
fn defaults_fill_what_is_not_said() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.control, Path::new("/run/sublet/control.sock"));
    assert_eq!(config.ports[0].heartbeat, Duration::from_millis(250));
    assert_eq!(config.ports[0].lost_after, Duration::from_millis(1500));
    assert!(!config.ports[0].trust_vmm);
    assert_eq!(config.limits.guest_maps, 4_000);
    assert_eq!(config.state, Path::new("/var/lib/sublet"));
    assert_eq!(config.limits.lease_ttl, Duration::from_secs(60));
    assert!(config.policy.memory_check);
    assert_eq!(config.policy.bars, BarMode::Trapped);
}

#[test]
fn state_folder_and_time_to_live_are_taken_and_their_bounds_told() {
    let state = format!("/{}", "s".repeat(STATE_PATH_MAX - 1));
    let said = |state: &str, ttl: u32| {
        parse(&format!(
            "{GOOD}\n[daemon]\nstate = \"{state}\"\n[limits]\nlease_ttl_ms = {ttl}\n"
        ))
    };
    let config = said(&state, 20_000).unwrap();
    assert_eq!(config.state, Path::new(&state));
    assert_eq!(config.limits.lease_ttl, Duration::from_secs(20));
    let long = said(&format!("{state}s"), 20_000).unwrap_err().to_string();
    assert!(long.contains("at most 1024 bytes"), "{long}");
    let short = said("/s", 19_999).unwrap_err().to_string();
    assert!(short.contains("write 20000 to 86400000"), "{short}");
    let relative = said("state", 20_000).unwrap_err().to_string();
    assert!(relative.contains("write an absolute path"), "{relative}");
}

#[test]
fn a_port_is_never_lent_whatever_the_allow_list_says() {
    let config = parse(&format!("{GOOD}\n[policy]\nallow = [\"*\"]\n")).unwrap();
    assert!(!config.may_lend("02:00.0".parse().unwrap()));
    assert!(config.may_lend("02:00.1".parse().unwrap()));
}

#[test]
fn a_bare_socket_name_lies_in_the_sockets_directory_and_a_path_stays() {
    let config = parse(GOOD).unwrap();
    assert_eq!(
        config.socket_path(Path::new("vm.sock")),
        Path::new("/run/sublet/vm.sock")
    );
    assert_eq!(
        config.socket_path(Path::new("/tmp/vm.sock")),
        Path::new("/tmp/vm.sock")
    );
}

#[test]
fn an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one() {
    assert_eq!(
        refusal(&format!("{GOOD}heartbeet_ms = 250\n")),
        "s.toml:10:1: unknown key `heartbeet_ms`; the nearest known key is `heartbeat_ms`"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[polcy]\nallow = []\n")),
        "s.toml:10:2: unknown key `polcy`; the nearest known key is `policy`"
    );
    assert_eq!(
        refusal(&GOOD.replace("id = 4", "id = 4\n  nmae = \"x\"")),
        "s.toml:3:3: unknown key `nmae`; the nearest known key is `name`"
    );
}

#[test]
fn a_missing_key_is_named() {
    assert_eq!(
        refusal(&GOOD.replace("id = 4\n", "")),
        "s.toml:1:1: the key `id` is missing; add it to this table"
    );
    assert_eq!(
        refusal(&GOOD.replace("peers = \"cable\"\n", "")),
        "s.toml:5:1: the key `peers` is missing; add it to this table"
    );
    assert_eq!(
        refusal("[node]\nid = 4\nname = \"a\"\n"),
        "s.toml:4:1: there is no [[port]], so this host could neither lend nor borrow; \
         add a [[port]] for each NTB function"
    );
}

#[test]
fn a_wrong_type_is_told_with_what_belongs_there() {
    assert_eq!(
        refusal(&GOOD.replace("id = 4", "id = \"4\"")),
        "s.toml:2:6: wrong type: string \"4\"; write an integer here"
    );
    assert_eq!(
        refusal(&format!("{GOOD}trust_vmm = \"yes\"\n")),
        "s.toml:10:13: wrong type: string \"yes\"; write true or false here"
    );
    assert_eq!(
        refusal(&format!("{GOOD}window_limit_bytes = true\n")),
        "s.toml:10:22: wrong type: boolean `true`; \
         write a number of bytes, such as 1073741824 or \"1G\" here"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[policy]\nallow = \"*\"\n")),
        "s.toml:11:9: wrong type: string \"*\"; write a list here"
    );
}

#[test]
fn values_out_of_range_are_told_with_the_range() {
    assert_eq!(
        refusal(&GOOD.replace("id = 4", "id = 65536")),
        "s.toml:2:6: `id` is 65536, out of range; write 0 to 65535"
    );
    assert_eq!(
        refusal(&format!("{GOOD}heartbeat_ms = 9\n")),
        "s.toml:10:16: `heartbeat_ms` is 9, out of range; write 10 to 60000"
    );
    assert_eq!(
        refusal(&format!("{GOOD}heartbeat_ms = 250\nlost_after_ms = 499\n")),
        "s.toml:11:17: `lost_after_ms` is 499, out of range; write 500 to 600000"
    );
    assert_eq!(
        refusal(&format!("{GOOD}heartbeat_ms = 1000\n")),
        "s.toml:10:16: with `heartbeat_ms` 1000 the default `lost_after_ms` of 1500 is less than \
         two heartbeats; add lost_after_ms = 6000"
    );
    assert_eq!(
        refusal(&format!("{GOOD}window_limit_bytes = \"3M\"\n")),
        "s.toml:10:22: `window_limit_bytes` is 3145728; write a multiple of 2M from 4M on"
    );
    for key in ["vmm_uids", "vmm_gids"] {
        let list = |count: usize, id: i64| {
            let ids = vec![id.to_string(); count].join(", ");
            parse(&format!("{GOOD}[policy]\n{key} = [{ids}]\n"))
        };
        assert!(list(VMM_PEERS_MAX, 4_294_967_294).is_ok());
        assert!(list(VMM_PEERS_MAX + 1, 1).is_err());
        assert!(list(1, 4_294_967_295).is_err() && list(1, -1).is_err());
    }
    for (key, most) in [
        ("functions_per_port", 64),
        ("functions_per_domain", 1024),
        ("guest_maps", 65_535),
        ("worker_messages_per_second", 1_000_000),
        ("interrupts_per_second", 10_000_000),
    ] {
        for (count, accepted) in [(0, false), (1, true), (most, true), (most + 1, false)] {
            let text = format!("{GOOD}[limits]\n{key} = {count}\n");
            assert_eq!(parse(&text).is_ok(), accepted, "{key} = {count}");
        }
    }
}

#[test]
fn malformed_values_are_told_with_the_form_that_is_right() {
    assert_eq!(
        refusal(&GOOD.replace("02:00.0", "02:00")),
        "s.toml:7:7: `bdf` is malformed; `02:00` is no PCI address: \
         write BUS:DEV.FN or DOMAIN:BUS:DEV.FN in hex, such as 4a:00.1"
    );
    assert_eq!(
        refusal(&GOOD.replace("\"cable\"", "\"cabel\"")),
        "s.toml:8:9: `peers` is \"cabel\"; write `cable`; the nearest is `cable`"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[policy]\nallow = [\"01:00.1\", \"02\"]\n")),
        "s.toml:11:21: `allow` has a malformed entry; `02` names no PCI functions: \
         write 01:00.1, 01:00.*, 0000:02:* or *"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[policy]\nbars = \"maped\"\n")),
        "s.toml:11:8: `bars` is \"maped\"; write `trapped` or `mapped`; the nearest is `mapped`"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[limits]\nguest_mapped_bytes = \"1GB\"\n")),
        "s.toml:11:22: `guest_mapped_bytes` is malformed; `1GB` is no number of bytes: \
         write digits and K, M, G or T (binary), such as 512M"
    );
    assert_eq!(
        refusal(&GOOD.replace("name = \"a\"", "name = \"é a\"")),
        "s.toml:3:8: `name` is \"é a\"; write 1 to 64 letters, digits, `.`, `_` or `-`"
    );
    assert_eq!(
        refusal(&format!("{GOOD}[daemon]\ncontrol = \"c.sock\"\n")),
        "s.toml:11:11: `control` is \"c.sock\"; write an absolute path of at most 90 bytes"
    );
}

#[test]
fn far_end_is_who_it_says_unless_the_configuration_knows_better() {
    let port = GOOD.split_once("\n\n").unwrap().1;
    let second = port.replace("ntb0", "ntb1").replace("02:00.0", "03:00.0");
    let with = |first: &str, other: &str| {
        let at = |port: &str, key: &str| port.replace("peers =", &format!("{key}\npeers ="));
        let (first, other) = (at(port, first), at(&second, other));
        parse(&format!("[node]\nid = 4\nname = \"a\"\n{first}{other}"))
    };
    let said = |config: &Config, at: usize, node| config.far_end(at).check(node);
    let none = with("", "").unwrap();
    assert_eq!([0, 1].map(|at| said(&none, at, 8)), [Ok(8), Ok(8)]);
    assert_eq!(said(&none, 0, 4), Err(NotBelieved::Own(4)));
    let one = with("", "peer_node = 8").unwrap();
    assert!(one.far_end(1).is_declared() && !one.far_end(0).is_declared());
    let port = "ntb1".to_owned();
    let elsewhere = NotBelieved::Elsewhere { said: 8, port };
    assert_eq!(said(&one, 0, 8), Err(elsewhere));
    assert_eq!([said(&one, 0, 9), said(&one, 1, 8)], [Ok(9), Ok(8)]);
    let other = NotBelieved::Other { said: 9, node: 8 };
    assert_eq!(said(&one, 1, 9), Err(other));
    let both = with("peer_node = 8", "peer_node = 8").unwrap();
    assert_eq!([0, 1].map(|at| said(&both, at, 8)), [Ok(8), Ok(8)]);
    let own = with("peer_node = 4", "").unwrap_err().to_string();
    assert!(
        own.ends_with(
            "`peer_node` is 4, which is this host; write the `id` of the host at the far end"
        ),
        "{own}"
    );
    assert!(with("peer_node = 65536", "").is_err());
}

#[test]
fn a_port_that_is_there_twice_is_refused() {
    let second = |name: &str, bdf: &str| {
        let port = GOOD.split_once("\n\n").unwrap().1;
        let port = port.replace("ntb0", name).replace("02:00.0", bdf);
        refusal(&format!("{GOOD}{port}"))
    };
    assert_eq!(
        second("ntb0", "03:00.0"),
        "s.toml:11:8: a second port is named `ntb0`; give each port a name of its own"
    );
    assert_eq!(
        second("ntb1", "0000:02:00.0"),
        "s.toml:12:7: 0000:02:00.0 is the port `ntb0` already; name each NTB function once"
    );
}

#[test]
fn ports_are_counted_to_the_limit() {
    let ports = |count: usize| {
        let port = |n| {
            GOOD.split_once("\n\n")
                .unwrap()
                .1
                .replace("ntb0", &format!("ntb{n}"))
                .replace("02:00", &format!("{n:02x}:00"))
        };
        let all: String = (0..count).map(port).collect();
        parse(&format!("[node]\nid = 4\nname = \"a\"\n{all}"))
    };
    assert_eq!(ports(PORTS_MAX).unwrap().ports.len(), PORTS_MAX);
    assert!(ports(PORTS_MAX + 1).is_err());
}

#[test]
fn what_is_no_toml_is_told_with_its_place() {
    let words = refusal("[node\nid = 4\n");
    assert!(words.starts_with("s.toml:1:6: "), "{words}");
    let words = refusal("[node]\nid = 4\nid = 5\n");
    assert_eq!(
        words,
        "s.toml:3:1: duplicate key; see the sample files in tests/lab/config"
    );
}

#[test]
fn a_file_that_is_not_there_is_told_with_its_path() {
    let words = Config::load(Path::new("/nonexistent/s.toml"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        words,
        "cannot read the configuration /nonexistent/s.toml: \
         No such file or directory (os error 2); name a readable file with --config"
    );
}
