//! The binary against a host without hardware: output forms, refusals, exit codes.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod fake;

use fake::Server;
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Command, Output},
};
use sublet::daemon::{control::Deadlines, socket::ControlSocket, vocabulary::*};
use tempfile::TempDir;

fn sublet(control: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sublet"))
        .arg("--control")
        .arg(control)
        .args(args)
        .output()
        .unwrap()
}

fn served() -> (TempDir, std::path::PathBuf, Server) {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let server = Server::start(&control, Deadlines::default());
    (dir, control, server)
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn parsed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn list_prints_smartio_tools_line() {
    let (_dir, control, _server) = served();
    let output = sublet(&control, &["list"]);
    assert_eq!(
        stdout(&output),
        "44a01: VGA compatible controller Intel Corporation Device e212 [available]\n"
    );
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn list_as_json_tells_ids_and_state() {
    let (_dir, control, _server) = served();
    let list = parsed(&sublet(&control, &["--json", "list"]));
    assert_eq!(
        list,
        json!([{
            "fdid": "44a01", "location": "remote", "available": "available",
            "name": "VGA compatible controller Intel Corporation Device e212",
            "vendor": "8086", "device": "e212",
            "subsystem_vendor": "8086", "subsystem_device": "1114",
            "class": "030000", "revision": "00",
        }])
    );
}

#[test]
fn borrow_prints_smartio_tools_block_and_the_socket() {
    let (_dir, control, server) = served();
    let output = sublet(
        &control,
        &["borrow", "44a01", "--socket", "vm.sock", "--ram", "128M"],
    );
    assert_eq!(
        stdout(&output),
        "\
Name: VGA compatible controller Intel Corporation Device e212
Available: in use
Location: remote
Adapter: 0
NodeId: 4
Remote BDF: 0000:4a:00.1
Physical slot: N/A
Serial Number: 00-00-00-00-00-00-00-00
UUID: N/A
Vendor ID: 8086
Device ID: e212
Subsystem Vendor ID: 8086
Subsystem Device ID: 1114
Local users: 1
Local virtual device: N/A
Bound to driver: N/A
Socket: vm.sock
"
    );
    assert_eq!(
        *server.host.verbs.lock().unwrap(),
        [Verb::Borrow {
            fdid: fake::fdid("44a01"),
            socket: "vm.sock".into(),
            ram: Some(128 << 20),
            bars: None,
            trust_vmm: false,
            trust_domain: None,
        }]
    );
}

#[test]
fn a_relative_socket_path_is_meant_from_where_the_operator_is() {
    let (dir, control, server) = served();
    let output = Command::new(env!("CARGO_BIN_EXE_sublet"))
        .current_dir(dir.path())
        .arg("--control")
        .arg(&control)
        .args([
            "borrow",
            "44a01",
            "--socket",
            "./vm.sock",
            "--bars",
            "mapped",
            "--trust-vmm",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let verbs = server.host.verbs.lock().unwrap();
    let Verb::Borrow {
        socket,
        bars,
        trust_vmm,
        ..
    } = &verbs[0]
    else {
        panic!("{verbs:?}");
    };
    assert!(
        socket.is_absolute() && socket.ends_with("vm.sock"),
        "{socket:?}"
    );
    assert_eq!((*bars, *trust_vmm), (Some(BarMode::Mapped), true));
}

#[test]
fn the_lenders_verbs_are_silent_when_done() {
    let (_dir, control, server) = served();
    for verb in ["add", "available", "unavailable", "remove"] {
        let output = sublet(&control, &[verb, "4a:00.1"]);
        assert_eq!(
            (stdout(&output), output.status.code()),
            ("", Some(0)),
            "{verb}"
        );
    }
    let bdf = fake::bdf("0000:4a:00.1");
    assert_eq!(
        *server.host.verbs.lock().unwrap(),
        [
            Verb::Add { bdf },
            Verb::Available { bdf, port: None },
            Verb::Unavailable { bdf },
            Verb::Remove { bdf }
        ]
    );
    sublet(&control, &["available", "4a:00.1", "--port", "ntb1"]);
    let port = Some("ntb1".to_owned());
    let last = server.host.verbs.lock().unwrap().pop();
    assert_eq!(last, Some(Verb::Available { bdf, port }));
    let output = sublet(&control, &["add", "4a:00.1", "--json"]);
    assert_eq!(parsed(&output), json!({"done": true}));
}

#[test]
fn status_tells_what_needs_attention_first() {
    let (_dir, control, _server) = served();
    let output = sublet(&control, &["status"]);
    let lines: Vec<&str> = stdout(&output).lines().map(str::trim_end).collect();
    assert_eq!(
        lines,
        [
            "node 8 (b), sublet 0.1.0, process 812, up 3 h 12 min",
            "",
            "NEEDS ATTENTION",
            "  port ntb0: the last session ended: the peer's heartbeat stood still for 1500 ms",
            "  port ntb0: 3 slices, 12 MiB of the window, 9 interrupt vectors wait until the other host confirms that nothing maps them",
            "",
            "port ntb0: 0000:02:00.0, Intel SPR",
            "  link      up, peer's heartbeat 120 ms ago",
            "  session   open, for 250 ms, peer node 4, id 000000000000abcd, version 1 (own 1..1, peer 1..1)",
            "  window    1 GiB, usable 1 GiB, free 512 MiB",
            "  mailbox   sent 12, received 11, resent 0, replays 0, torn 0, foreign 0, violations 0",
            "  doorbells rung 12, taken 30",
            "",
            "lent: nothing",
            "",
            "borrowed:",
            " fdid   state     lease             VMM  BARs     BAR accesses  maps  mapped   scanned  signals  refused  socket",
            " 44a01  attached  000000000000002a  901  trapped  42            3     128 MiB  12       11       0        /run/sublet/vm.sock",
            "",
            "quarantine: at port ntb0 3 slices, 12 MiB of the window, 9 interrupt vectors",
        ]
    );
    let status: HostStatus =
        serde_json::from_value(parsed(&sublet(&control, &["status", "--json"]))).unwrap();
    assert_eq!(status, fake::status());
}

#[test]
fn a_refusal_is_told_in_words_and_as_json_with_its_code() {
    let (_dir, control, _server) = served();
    let args = ["borrow", "44a02", "--socket", "vm.sock"];
    let output = sublet(&control, &args);
    assert_eq!(
        stderr(&output),
        "sublet: nobody lends 44a02; see `sublet list`\n"
    );
    assert_eq!((stdout(&output), output.status.code()), ("", Some(3)));
    let output = sublet(&control, &[&args[..], &["--json"]].concat());
    assert_eq!(
        parsed(&output),
        json!({"error": {"code": "unknown_function", "text": "nobody lends 44a02; see `sublet list`"}})
    );
    assert_eq!(
        stderr(&output),
        "sublet: nobody lends 44a02; see `sublet list`\n"
    );
}

#[test]
fn without_a_daemon_the_mend_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let output = sublet(&control, &["list"]);
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(
        stderr(&output),
        format!(
            "sublet: no daemon at {}: No such file or directory (os error 2); \
             start `sublet daemon`, or name its socket with --control\n",
            control.display()
        )
    );
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    let control = Path::new("/nonexistent");
    for args in [
        &["lend"][..],
        &["add", "4a:00.9"],
        &["borrow", "--socket", "x"],
        &["borrow", "4401", "--socket", "x"],
        &["borrow", "44a01", "--socket", "x", "--ram", "1GB"],
        &["port", "--config", "x"],
    ] {
        let output = sublet(control, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).starts_with("error: "), "{args:?}");
        let output = sublet(control, &[args, &["--json"]].concat());
        assert_eq!(parsed(&output)["error"]["code"], "usage", "{args:?}");
    }
    assert_eq!(sublet(control, &["--help"]).status.code(), Some(0));
}

#[test]
fn a_daemon_with_a_wrong_configuration_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "[nod]\n").unwrap();
    let args = [
        "daemon",
        "--in-process",
        "--config",
        config.to_str().unwrap(),
    ];
    let output = sublet(Path::new("/unused"), &args);
    assert_eq!(output.status.code(), Some(6));
    assert_eq!(
        stderr(&output),
        format!(
            "sublet: {}:1:2: unknown key `nod`; the nearest known key is `node`\n",
            config.display()
        )
    );
}

#[test]
fn a_second_daemon_is_refused_before_it_touches_a_port() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let config = dir.path().join("sublet.toml");
    let text = format!(
        "[node]\nid = 4\nname = \"a\"\n[daemon]\ncontrol = {control:?}\n\
         [[port]]\nname = \"ntb0\"\nbdf = \"02:00.0\"\npeers = \"cable\"\ntrust_domain = \"t\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let _first = ControlSocket::claim(&control).unwrap();
    let args = [
        "--json",
        "daemon",
        "--in-process",
        "--config",
        config.to_str().unwrap(),
    ];
    let output = sublet(Path::new("/unused"), &args);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(parsed(&output)["error"]["code"], "daemon_running");
    let words = format!(
        "sublet: process {} serves {}",
        std::process::id(),
        control.display()
    );
    assert!(stderr(&output).starts_with(&words), "{}", stderr(&output));
}
