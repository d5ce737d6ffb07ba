//! Migrations over a network: by TLS, with certificates that both ends check, or because the user has said that it may be
//! read.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::json;
use tempfile::{NamedTempFile, TempDir};
use tests::api::{Answer, DONE, Vmm, request};
use tests::lab::SOON;
use tests::outrigger::has_kvm;
use tests::skipped::skip;
use tests::tiny::counter::counter;
use tests::travels::free_port;

/// Folders of certificates: of an authority, and of another one with the same name.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn new() -> Option<Self> {
        if openssl(Path::new("/"), &["version"]).is_none() {
            skip("openssl, which makes certificates, is not there");
            return None;
        }
        let all = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        for name in ["good", "other"] {
            let folder = all.path(name);
            fs::create_dir(&folder).unwrap();
            fs::write(
                folder.join("config"),
                "[req]\ndistinguished_name=name\n[name]\n",
            )
            .unwrap();
            let make = |who: &str, extensions: &[&str], by_authority: bool| {
                let files = ["key", "cert"].map(|what| format!("{who}-{what}.pem"));
                let mut arguments = vec![
                    "req",
                    "-x509",
                    "-config",
                    "config",
                    "-nodes",
                    "-days",
                    "2",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-keyout",
                    &files[0],
                    "-out",
                    &files[1],
                    "-subj",
                ];
                let subject = format!("/CN={who}");
                arguments.push(&subject);
                for extension in extensions {
                    arguments.extend(["-addext", extension]);
                }
                if by_authority {
                    arguments.extend(["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]);
                }
                let made = openssl(&folder, &arguments).unwrap();
                assert!(made.status.success(), "{made:?}");
            };
            make("ca", &["basicConstraints=critical,CA:TRUE"], false);
            let end = "basicConstraints=critical,CA:FALSE";
            make("server", &[end, "subjectAltName=IP:127.0.0.1"], true);
            make("client", &[end, "subjectAltName=DNS:client"], true);
        }
        Some(all)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn openssl(folder: &Path, arguments: &[&str]) -> Option<Output> {
    let mut command = Command::new("openssl");
    command
        .current_dir(folder)
        .args(arguments)
        .stdin(Stdio::null());
    command.output().ok()
}

fn source() -> (Vmm, NamedTempFile) {
    let kernel = counter().unwrap();
    let path = kernel.path().to_str().unwrap();
    let mut vmm = Vmm::start(&["--kernel", path, "--memory", "size=64M"]).unwrap();
    vmm.process.wait_for("A", SOON).unwrap();
    (vmm, kernel)
}

fn send(vmm: &Vmm, url: &str, tls_dir: Option<&Path>) -> Answer {
    let mut body = json!({"destination_url": url, "connections": 4});
    if let Some(folder) = tls_dir {
        body["tls_dir"] = folder.to_str().into();
    }
    vmm.put("vm.send-migration", &body.to_string()).unwrap()
}

#[test]
fn only_those_with_certificates_move_vms_over_tls() {
    if !has_kvm() {
        return;
    }
    let Some(certificates) = Certificates::new() else {
        return;
    };
    let [good, other] = ["good", "other"].map(|name| certificates.path(name));
    let (mut here, _kernel) = source();
    let mut next = Vmm::start(&[]).unwrap();
    let url = free_port("127.0.0.1").unwrap();
    let body = json!({"receiver_url": url, "tls_dir": good});
    let receiving = next.begin("vm.receive-migration", &body);
    next.wait_phase("Listening").unwrap();

    let plain = send(&here, &url, None);
    assert!(plain.is_error(&["the VM does not move"]), "{plain:?}");
    let stranger = send(&here, &url, Some(&other));
    assert!(
        stranger.is_error(&["no TLS", "certificate"]),
        "{stranger:?}"
    );
    let none = send(&here, &url, Some(certificates.folder.path()));
    assert!(none.is_error(&["tls_dir", "client-cert.pem"]), "{none:?}");
    // Somebody who knows the authority, and is not of it.
    let address = url.strip_prefix("tcp:").unwrap();
    let connect = |version: &str| {
        let arguments = [
            "s_client",
            "-connect",
            address,
            "-CAfile",
            "ca-cert.pem",
            version,
        ];
        let said = openssl(&good, &arguments).unwrap();
        let said = [said.stdout, said.stderr].concat();
        String::from_utf8_lossy(&said).into_owned()
    };
    let said = connect("-tls1_2");
    assert!(said.contains("alert protocol version"), "{said}");
    let said = connect("-tls1_3");
    assert!(!said.contains("alert protocol version"), "{said}");
    assert_eq!(here.state().unwrap(), "Running");
    assert_eq!(
        next.wait_phase("Listening").unwrap()["operation"],
        "Receive"
    );

    assert_eq!(send(&here, &url, Some(&good)), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
    here.process.wait(SOON).unwrap();
    next.process.wait_for("Z", SOON).unwrap();

    // TLS, and nobody who speaks it.
    let last = Vmm::start(&[]).unwrap();
    let url = free_port("127.0.0.1").unwrap();
    let receiving = last.begin("vm.receive-migration", &json!({"receiver_url": url}));
    last.wait_phase("Listening").unwrap();
    let refused = send(&next, &url, Some(&good));
    assert!(refused.is_error(&["no TLS"]), "{refused:?}");
    assert_eq!(next.state().unwrap(), "Running");
    assert_eq!(send(&next, &url, None), DONE);
    assert_eq!(receiving.join().unwrap().unwrap(), DONE);
}

#[test]
fn nothing_goes_in_the_clear_over_a_network_unless_it_is_said() {
    if !has_kvm() {
        return;
    }
    let (here, _kernel) = source();
    // An address for documentation, where nobody is (RFC 5737).
    let refused = send(&here, "tcp:192.0.2.1:1", None);
    assert!(
        refused.is_error(&["192.0.2.1", "tls_dir", "insecure"]),
        "{refused:?}"
    );
    assert_eq!(here.state().unwrap(), "Running");
    let next = Vmm::start(&[]).unwrap();
    let url = free_port("127.0.0.1")
        .unwrap()
        .replace("127.0.0.1", "0.0.0.0");
    let body = json!({"receiver_url": url});
    let refused = next.put("vm.receive-migration", &body.to_string()).unwrap();
    assert!(
        refused.is_error(&["0.0.0.0", "tls_dir", "insecure"]),
        "{refused:?}"
    );
    let body = json!({"receiver_url": url, "insecure": true});
    let receiving = next.begin("vm.receive-migration", &body);
    next.wait_phase("Listening").unwrap();
    let cancelled = request(&next.socket, "DELETE", "vm.migration", "").unwrap();
    assert_eq!(cancelled, DONE);
    let answer = receiving.join().unwrap().unwrap();
    assert!(answer.is_error(&["cancelled"]), "{answer:?}");
}
