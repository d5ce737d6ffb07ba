//! TLS 1.3 between the two ends, each with a certificate that the other checks.
//!
//! A folder has the files that QEMU and Cloud Hypervisor look for, too: `ca-cert.pem`, and `client-cert.pem` and
//! `client-key.pem` for the end that connects, or `server-cert.pem` and `server-key.pem` for the one that listens.

use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file of the folder is missing or is none.
    #[error("tls_dir: cannot take {what} from {}", path.display())]
    File {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// What the folder has does not fit together.
    #[error("tls_dir: the certificates in {} cannot be used", folder.display())]
    Certificates {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The folder's authority cannot judge others' certificates.
    #[error("tls_dir: ca-cert.pem in {} cannot judge certificates", folder.display())]
    Authority {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// No certificate can be for such a host.
    #[error("{0} is no name that a certificate could have")]
    Host(String),
    /// The other end is not what it should be, or does not speak TLS.
    #[error("no TLS with the other end")]
    Handshake(#[source] io::Error),
}

/// The end that connects.
pub(super) type ClientStream = StreamOwned<ClientConnection, TcpStream>;
/// The end that listens.
pub(super) type ServerStream = StreamOwned<ServerConnection, TcpStream>;

/// How to connect.
#[derive(Debug, Clone)]
pub(super) struct Client(Arc<ClientConfig>);

/// How to listen.
#[derive(Debug, Clone)]
pub(super) struct Server(Arc<ServerConfig>);

impl Client {
    /// Takes the certificates from a folder.
    pub(super) fn new(folder: &Path) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Certificates {
            folder: folder.to_owned(),
            source,
        };
        let (chain, key) = identity(folder, "client")?;
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(authority(folder)?)
            .with_client_auth_cert(chain, key)
            .map(|config| Self(Arc::new(config)))
            .map_err(unusable)
    }

    /// Speaks TLS with the server, which must be `host`.
    pub(super) fn connect(&self, host: &str, stream: TcpStream) -> Result<ClientStream, TlsError> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|_| TlsError::Host(host.to_owned()))?;
        let connection = ClientConnection::new(self.0.clone(), name);
        let connection =
            connection.map_err(|error| TlsError::Handshake(io::Error::other(error)))?;
        let mut stream = StreamOwned::new(connection, stream);
        let done = stream.conn.complete_io(&mut stream.sock);
        done.map_err(TlsError::Handshake)?;
        Ok(stream)
    }
}

impl Server {
    /// Takes the certificates from a folder.
    pub(super) fn new(folder: &Path) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Certificates {
            folder: folder.to_owned(),
            source,
        };
        let (chain, key) = identity(folder, "server")?;
        let roots = Arc::new(authority(folder)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|source| TlsError::Authority {
                folder: folder.to_owned(),
                source,
            })?;
        ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map(|config| Self(Arc::new(config)))
            .map_err(unusable)
    }

    /// Speaks TLS with a client, which must have a certificate.
    pub(super) fn accept(&self, stream: TcpStream) -> Result<ServerStream, TlsError> {
        let connection = ServerConnection::new(self.0.clone());
        let connection =
            connection.map_err(|error| TlsError::Handshake(io::Error::other(error)))?;
        let mut stream = StreamOwned::new(connection, stream);
        let done = stream.conn.complete_io(&mut stream.sock);
        done.map_err(TlsError::Handshake)?;
        Ok(stream)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn authority(folder: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(folder.join("ca-cert.pem"))? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Certificates {
                folder: folder.to_owned(),
                source,
            })?;
    }
    Ok(roots)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(folder: &Path, end: &str) -> Result<Identity, TlsError> {
    let chain = certificates(folder.join(format!("{end}-cert.pem")))?;
    let path = folder.join(format!("{end}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| TlsError::File {
        what: "a private key",
        path,
        source,
    })?;
    Ok((chain, key))
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = all.and_then(|all| match all.is_empty() {
        true => Err(rustls::pki_types::pem::Error::NoItemsFound),
        false => Ok(all),
    });
    all.map_err(|source| TlsError::File {
        what: "certificates",
        path,
        source,
    })
}
