//! The sandbox, tried on processes of its own: each test that gives something up does it in a child.

use super::*;
use rustix::{
    event::{EventfdFlags, eventfd},
    io::{FdFlags, fcntl_setfd},
    process::{Resource, getrlimit},
};
use std::{
    fs::File,
    os::unix::process::ExitStatusExt,
    process::{Command, Output, exit},
};

/// Names the part that a child plays.
const PART: &str = "SUBLET_JAIL_TEST_PART";
const SIGSYS: i32 = 31;
const STDIO: [i32; 3] = [0, 1, 2];

/// Runs the test of this name once more, in a process of its own that plays the part.
fn child(test: &str, part: &str) -> Output {
    // Whatever started this test may have left descriptors open.
    keep_from_children();
    let program = std::env::current_exe().unwrap();
    let name = format!("jail::tests::{test}");
    let mut command = Command::new(program);
    command.args(["--exact", &name, "--nocapture"]);
    command.env(PART, part).output().unwrap()
}

/// The part that this process plays, if it is a child.
fn part() -> Option<String> {
    std::env::var(PART).ok()
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn succeeds(test: &str, part: &str) {
    let output = child(test, part);
    assert_eq!(output.status.code(), Some(0), "{part}: {}", text(&output));
}

const fn any(name: &'static str, number: i64) -> Call {
    Call {
        name,
        number,
        only: Only::Any,
        why: "a test",
    }
}

/// What a child needs to say how it went.
static LITTLE: Role = Role {
    name: "a test",
    limits: Limits {
        descriptors: 16,
        data_bytes: u64::MAX,
        locks_memory: true,
    },
    calls: &[
        any("write", libc::SYS_write),
        any("exit_group", libc::SYS_exit_group),
        any("sigaltstack", libc::SYS_sigaltstack),
        any("getuid", libc::SYS_getuid),
        any("munmap", libc::SYS_munmap),
        Call {
            name: "mmap, nothing that runs",
            number: libc::SYS_mmap,
            only: Only::Without(2, libc::PROT_EXEC as u64),
            why: "a test",
        },
        Call {
            name: "fcntl(F_GETFL)",
            number: libc::SYS_fcntl,
            only: Only::Is(1, libc::F_GETFL as u64),
            why: "a test",
        },
        Call {
            name: "fcntl(F_GETFD)",
            number: libc::SYS_fcntl,
            only: Only::Is(1, libc::F_GETFD as u64),
            why: "a test",
        },
    ],
};

#[test]
fn descriptor_that_somebody_left_open_is_told_and_refuses_the_process() {
    if part().is_some() {
        let error = confine(&LITTLE, Sandbox::Off, &STDIO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("eventfd"), "{error}");
        exit(0);
    }
    let left = eventfd(0, EventfdFlags::empty()).unwrap();
    let program = std::env::current_exe().unwrap();
    let name = "descriptor_that_somebody_left_open_is_told_and_refuses_the_process";
    let mut command = Command::new(program);
    command.args(["--exact", &format!("jail::tests::{name}"), "--nocapture"]);
    let output = command.env(PART, "child").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    drop(left);
}

#[test]
fn descriptor_kept_from_children_is_not_in_a_child() {
    if part().is_some() {
        assert_eq!(check_descriptors(&STDIO).unwrap(), Vec::<String>::new());
        exit(0);
    }
    let open = eventfd(0, EventfdFlags::empty()).unwrap();
    fcntl_setfd(&open, FdFlags::empty()).unwrap();
    keep_from_children();
    succeeds("descriptor_kept_from_children_is_not_in_a_child", "child");
}

#[test]
fn confined_process_reaches_no_file_no_network_and_no_capability() {
    if part().is_some() {
        let confined = confine(&LITTLE, Sandbox::On, &STDIO).unwrap();
        assert!(File::open("/proc/self/status").is_err(), "a file");
        assert!(File::create("/tmp/sublet-jail-test").is_err(), "a new file");
        assert!(std::fs::read_dir("/").is_err(), "a folder");
        // Refused before anybody looks whether there is a network or a listener.
        let to = std::net::TcpStream::connect("127.0.0.1:9").unwrap_err();
        assert_eq!(to.kind(), std::io::ErrorKind::PermissionDenied);
        let at = std::net::TcpListener::bind("127.0.0.1:0").unwrap_err();
        assert_eq!(at.kind(), std::io::ErrorKind::PermissionDenied);
        let held = rustix::thread::capabilities(None).unwrap();
        assert!(held.permitted.is_empty() && held.effective.is_empty());
        assert!(rustix::thread::no_new_privs().unwrap());
        let files = getrlimit(Resource::Nofile);
        assert_eq!((files.current, files.maximum), (Some(16), Some(16)));
        assert!(confined.report.landlock && !confined.report.seccomp);
        exit(0);
    }
    succeeds(
        "confined_process_reaches_no_file_no_network_and_no_capability",
        "child",
    );
}

#[test]
fn sealed_process_makes_the_calls_of_its_list_and_dies_of_any_other() {
    let test = "sealed_process_makes_the_calls_of_its_list_and_dies_of_any_other";
    if let Some(part) = part() {
        let report = confine(&LITTLE, Sandbox::On, &STDIO)
            .unwrap()
            .seal()
            .unwrap();
        assert!(report.is_closed());
        let fd = std::io::stderr();
        match part.as_str() {
            "listed" => {
                let _ = rustix::process::getuid();
                let _ = rustix::fs::fcntl_getfl(&fd).unwrap();
                let _ = rustix::io::fcntl_getfd(&fd).unwrap();
                drop(Vec::<u8>::with_capacity(1 << 24));
            }
            "unlisted" => drop(rustix::process::getpid()),
            "argument" => drop(rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)),
            other => panic!("{other}"),
        }
        exit(0);
    }
    succeeds(test, "listed");
    for part in ["unlisted", "argument"] {
        let status = child(test, part).status;
        assert_eq!(status.signal(), Some(SIGSYS), "{part}: {status}");
    }
}

#[test]
fn each_entry_of_a_list_is_needed() {
    let test = "each_entry_of_a_list_is_needed";
    if let Some(part) = part() {
        let without: Vec<Call> = LITTLE
            .calls
            .iter()
            .copied()
            .filter(|c| c.name != part)
            .collect();
        calls::hold_to(&without).unwrap();
        let fd = std::io::stderr();
        let _ = rustix::process::getuid();
        let _ = rustix::fs::fcntl_getfl(&fd);
        let _ = rustix::io::fcntl_getfd(&fd);
        drop(Vec::<u8>::with_capacity(1 << 24));
        let _ = rustix::io::write(&fd, b"here\n");
        exit(0);
    }
    succeeds(test, "none of them");
    for call in LITTLE.calls {
        let status = child(test, call.name).status;
        assert_eq!(status.signal(), Some(SIGSYS), "without {}", call.name);
    }
}

#[test]
fn no_role_makes_a_page_that_runs() {
    let roles = [
        &crate::daemon::ROLE,
        &crate::port::ROLE,
        &crate::worker::ROLE,
        &crate::keeper::ROLE,
        &crate::keeper::CHECKS,
    ];
    let nothing_that_runs = Only::Without(2, libc::PROT_EXEC as u64);
    for role in roles {
        for call in role.calls {
            match call.number {
                libc::SYS_mmap | libc::SYS_mprotect => {
                    assert_eq!(call.only, nothing_that_runs, "{}: {}", role.name, call.name);
                }
                libc::SYS_pkey_mprotect | libc::SYS_shmat | libc::SYS_personality => {
                    panic!("{}: {}", role.name, call.name);
                }
                _ => {}
            }
        }
    }
}

/// Makes the kernel answer one system call as a kernel without it does.
fn take_away(number: i64, errno: i32) {
    let filter = seccompiler::SeccompFilter::new(
        [(number, vec![])].into(),
        seccompiler::SeccompAction::Allow,
        seccompiler::SeccompAction::Errno(errno as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

#[test]
fn kernel_without_landlock_or_seccomp_is_refused_unless_told_so() {
    let test = "kernel_without_landlock_or_seccomp_is_refused_unless_told_so";
    if let Some(part) = part() {
        match part.as_str() {
            "landlock" => {
                take_away(libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP);
                let error = confine(&LITTLE, Sandbox::On, &STDIO)
                    .unwrap_err()
                    .to_string();
                assert!(error.contains("--sandbox=off"), "{error}");
            }
            "seccomp" => {
                take_away(libc::SYS_seccomp, libc::ENOSYS);
                let confined = confine(&LITTLE, Sandbox::On, &STDIO).unwrap();
                let error = confined.seal().unwrap_err().to_string();
                assert!(error.contains("CONFIG_SECCOMP_FILTER"), "{error}");
            }
            "off" => {
                take_away(libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP);
                let report = confine(&LITTLE, Sandbox::Off, &STDIO)
                    .unwrap()
                    .seal()
                    .unwrap();
                assert_eq!(report, Report::default());
                assert!(!report.is_closed());
            }
            other => panic!("{other}"),
        }
        exit(0);
    }
    for part in ["landlock", "seccomp", "off"] {
        succeeds(test, part);
    }
}
