//! Builds the root of a host or a guest: busybox, the agent, the kernel modules wanted, and /init.
//!
//! It is not compressed: QEMU copies it into memory faster than an emulated processor unpacks it.

use crate::cache::{Cache, Kernel};
use crate::cpio::Archive;
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BUSYBOX: &str = "/bin/busybox";

/// What the runner's requests come in by.
#[derive(Clone, Copy, Debug)]
pub enum Port {
    /// The virtio-serial port named [`PORT_NAME`].
    Virtio,
    /// A serial line, put into raw mode.
    Serial(&'static str),
}

/// The name of the agent's virtio-serial port.
pub const PORT_NAME: &str = "lab.agent";

/// What goes into an initramfs.
pub struct Initramfs<'a> {
    /// The kernel it is for.
    pub kernel: &'a Kernel,
    /// Modules to load, in this order, each after what it needs; `name key=value` gives parameters.
    /// A name that the kernel has no file for is built in.
    pub modules: Vec<String>,
    /// More files: path inside, and the file outside.
    pub files: Vec<(String, PathBuf)>,
    /// Modules that no Debian package has, loaded after the others: the file, then its parameters.
    pub built_modules: Vec<(PathBuf, String)>,
    /// Shell lines that run before any module is loaded.
    pub early: String,
    /// Shell lines that run after the modules are loaded.
    pub setup: String,
    /// How the agent is reached.
    pub port: Port,
}

impl Initramfs<'_> {
    /// Writes the archive.
    pub fn write(&self, cache: &Cache, path: &Path) -> Result<()> {
        let mut archive = Archive::default();
        for dir in [
            "bin",
            "dev",
            "proc",
            "sys",
            "run",
            "tmp",
            "lab",
            "lab/cache",
            "lab/run",
            "lab/modules",
        ] {
            archive.folder(dir);
        }
        add_busybox(&mut archive)?;
        add_file(&mut archive, "bin/lab-agent", &cache.binary("lab-agent")?)?;
        for (inside, outside) in &self.files {
            add_file(&mut archive, inside, outside)?;
        }
        let loads = self.add_modules(&mut archive)?;
        archive.file("init", self.script(&loads).as_bytes());
        archive.write(path)
    }

    /// Gives the `insmod` lines back.
    fn add_modules(&self, archive: &mut Archive) -> Result<String> {
        let all = Modules::read(&self.kernel.modules)?;
        let mut loads = String::new();
        let mut done: Vec<&str> = Vec::new();
        for wanted in &self.modules {
            let (name, parameters) = wanted.split_once(' ').unwrap_or((wanted, ""));
            for file in all.order(name) {
                if done.contains(&file) {
                    continue;
                }
                done.push(file);
                let own = module_name(file) == name.replace('-', "_");
                let parameters = if own { parameters } else { "" };
                let inside = format!("lab/modules/{}.ko", module_name(file));
                archive.file(&inside, &unpack(&self.kernel.modules.join(file))?);
                loads += &format!("insmod /{inside} {parameters}\n");
            }
        }
        for (file, parameters) in &self.built_modules {
            let inside = format!(
                "lab/modules/{}.ko",
                module_name(&file.display().to_string())
            );
            archive.file(&inside, &unpack(file)?);
            loads += &format!("insmod /{inside} {parameters}\n");
        }
        Ok(loads)
    }

    /// The shell stays process 1, so that orphans are reaped.
    fn script(&self, loads: &str) -> String {
        let port = match self.port {
            Port::Virtio => format!(
                "P=\nwhile [ -z \"$P\" ]; do\n\
                 for d in /sys/class/virtio-ports/*; do [ \"$(cat $d/name 2>/dev/null)\" = {PORT_NAME} ] && P=/dev/${{d##*/}}; done\n\
                 [ -n \"$P\" ] || usleep 20000\ndone\n"
            ),
            Port::Serial(line) => format!("P=/dev/{line}\nstty -F $P raw -echo\n"),
        };
        format!(
            "#!/bin/sh\n\
             export PATH=/bin HOME=/tmp\necho lab: the first program runs\n\
             mount -t devtmpfs dev /dev\nmount -t proc proc /proc\nmount -t sysfs sys /sys\n\
             mount -t tmpfs run /run\nmount -t tmpfs tmp /tmp\n\
             mkdir -p /dev/pts /dev/shm /dev/hugepages\nmount -t devpts pts /dev/pts\nmount -t tmpfs shm /dev/shm\n\
             {early}\n{loads}{setup}\n{port}\
             lab-agent serve $P &\nA=$!\n\
             echo lab: agent on $P\nwait $A\necho lab: agent ended\npoweroff -f\n",
            early = self.early,
            setup = self.setup,
        )
    }
}

fn add_file(archive: &mut Archive, inside: &str, outside: &Path) -> Result<()> {
    let content =
        fs::read(outside).with_context(|| format!("cannot read {}", outside.display()))?;
    archive.file(inside, &content);
    Ok(())
}

fn add_busybox(archive: &mut Archive) -> Result<()> {
    add_file(archive, "bin/busybox", Path::new(BUSYBOX))?;
    let list = Command::new(BUSYBOX)
        .arg("--list")
        .output()
        .context("cannot run busybox")?;
    for applet in String::from_utf8_lossy(&list.stdout).split_whitespace() {
        if applet != "busybox" {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
    }
    Ok(())
}

/// Debian compresses modules; busybox's insmod takes them plain.
fn unpack(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(file)
        .output()
        .context("cannot run xz")?;
    ensure!(
        output.status.success(),
        "xz cannot unpack {}",
        file.display()
    );
    Ok(output.stdout)
}

/// `kernel/drivers/nvme/host/nvme-core.ko.xz` is `nvme_core`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// `modules.dep`: each file, and what it needs, the last of them first.
struct Modules(HashMap<String, Vec<String>>);

impl Modules {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("modules.dep");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut files = HashMap::new();
        for (file, needs) in text.lines().filter_map(|line| line.split_once(':')) {
            let mut order: Vec<String> =
                needs.split_whitespace().rev().map(str::to_owned).collect();
            order.push(file.to_owned());
            files.insert(module_name(file), order);
        }
        Modules(files)
    }

    /// Files to load for a module, itself last; none for one that is built in.
    fn order(&self, name: &str) -> impl Iterator<Item = &str> {
        let order = self.0.get(&name.replace('-', "_"));
        order.into_iter().flatten().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::Modules;

    #[test]
    fn what_a_module_needs_is_loaded_first() {
        let modules =
            Modules::parse("k/a-b.ko.xz: k/c.ko.xz k/d.ko.xz\nk/c.ko.xz: k/d.ko.xz\nk/d.ko.xz:\n");
        let order: Vec<&str> = modules.order("a_b").collect();
        assert_eq!(order, ["k/d.ko.xz", "k/c.ko.xz", "k/a-b.ko.xz"]);
        assert_eq!(modules.order("built_in").count(), 0);
    }
}
