//! A throw-away certificate authority: what servers and clients of a test prove themselves with.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{LazyLock, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use openssl::{
    asn1::Asn1Time,
    bn::{BigNum, MsbOption},
    ec::{EcGroup, EcKey},
    hash::MessageDigest,
    nid::Nid,
    pkey::{PKey, Private},
    ssl::{SslConnector, SslMethod},
    x509::{
        X509, X509Builder, X509NameBuilder,
        extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName},
    },
};
use postgres_openssl::MakeTlsConnector;

/// Days that certificates are valid for.
const VALIDITY: u32 = 30;

/// Signs certificates. Its key is never written to disk.
pub struct Authority {
    certificate: X509,
    key: PKey<Private>,
    /// By role. Making one reads all certificates that the system trusts, which costs more than a connection.
    connectors: Mutex<HashMap<String, MakeTlsConnector>>,
}

/// A certificate and its key.
pub struct Identity {
    certificate: X509,
    key: PKey<Private>,
}

impl Identity {
    /// The certificate as PEM.
    pub fn certificate_pem(&self) -> Result<Vec<u8>> {
        Ok(self.certificate.to_pem()?)
    }

    /// The unencrypted key as PEM (PKCS#8).
    pub fn key_pem(&self) -> Result<Vec<u8>> {
        Ok(self.key.private_key_to_pem_pkcs8()?)
    }
}

impl Authority {
    /// The one that all servers of this process share unless they are told otherwise.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Authority> = LazyLock::new(|| Authority::new().expect("a certificate authority"));
        &SHARED
    }

    /// A new one, trusted by nobody yet.
    pub fn new() -> Result<Self> {
        let key = new_key()?;
        let mut builder = start("stillebot test authority", &key)?;
        builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
        let issuer = builder_subject("stillebot test authority")?;
        builder.set_issuer_name(issuer.as_ref())?;
        builder.sign(&key, MessageDigest::sha256())?;
        Ok(Self { certificate: builder.build(), key, connectors: Mutex::default() })
    }

    /// The root certificate as PEM, for `sslrootcert`.
    pub fn root_pem(&self) -> Result<Vec<u8>> {
        Ok(self.certificate.to_pem()?)
    }

    /// For a server reached as `localhost`, as 127.0.0.1 and by these names or addresses.
    pub fn server(&self, extra_names: &[String]) -> Result<Identity> {
        let mut names = SubjectAlternativeName::new();
        names.dns("localhost").ip("127.0.0.1");
        for name in extra_names {
            match name.parse::<IpAddr>() {
                Ok(_) => names.ip(name),
                Err(_) => names.dns(name),
            };
        }
        let common_name = extra_names.first().map_or("localhost", String::as_str);
        self.issue(common_name, |builder| {
            let extension = names.build(&builder.x509v3_context(Some(&self.certificate), None))?;
            builder.append_extension(extension)?;
            Ok(builder.append_extension(ExtendedKeyUsage::new().server_auth().build()?)?)
        })
    }

    /// For a client that logs in as this role (PostgreSQL's `cert` compares the common name).
    pub fn client(&self, role: &str) -> Result<Identity> {
        self.issue(role, |builder| Ok(builder.append_extension(ExtendedKeyUsage::new().client_auth().build()?)?))
    }

    /// What tokio-postgres needs to connect as this role and to verify the server in full.
    pub fn connector(&self, role: &str) -> Result<MakeTlsConnector> {
        let mut connectors = self.connectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connector) = connectors.get(role) {
            return Ok(connector.clone());
        }
        let identity = self.client(role)?;
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.cert_store_mut().add_cert(self.certificate.clone())?;
        builder.set_certificate(&identity.certificate)?;
        builder.set_private_key(&identity.key)?;
        builder.check_private_key()?;
        let connector = MakeTlsConnector::new(builder.build());
        connectors.insert(role.to_owned(), connector.clone());
        Ok(connector)
    }

    fn issue(&self, common_name: &str, extend: impl FnOnce(&mut X509Builder) -> Result<()>) -> Result<Identity> {
        let key = new_key()?;
        let mut builder = start(common_name, &key)?;
        builder.set_issuer_name(self.certificate.subject_name())?;
        builder.append_extension(BasicConstraints::new().critical().build()?)?;
        builder.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
        extend(&mut builder)?;
        builder.sign(&self.key, MessageDigest::sha256())?;
        Ok(Identity { certificate: builder.build(), key })
    }
}

fn new_key() -> Result<PKey<Private>> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?).context("no key")
}

fn builder_subject(common_name: &str) -> Result<openssl::x509::X509Name> {
    let mut name = X509NameBuilder::new()?;
    name.append_entry_by_nid(Nid::COMMONNAME, common_name)?;
    Ok(name.build())
}

/// A certificate with all but its issuer, its purpose and its signature.
fn start(common_name: &str, key: &PKey<Private>) -> Result<X509Builder> {
    let mut serial = BigNum::new()?;
    serial.rand(128, MsbOption::MAYBE_ZERO, false)?;
    let subject = builder_subject(common_name)?;
    let mut builder = X509::builder()?;
    builder.set_version(2)?;
    builder.set_serial_number(serial.to_asn1_integer()?.as_ref())?;
    builder.set_subject_name(subject.as_ref())?;
    // From yesterday: a test may turn clocks back.
    let yesterday = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() - 86_400;
    builder.set_not_before(Asn1Time::from_unix(yesterday.try_into()?)?.as_ref())?;
    builder.set_not_after(Asn1Time::days_from_now(VALIDITY)?.as_ref())?;
    builder.set_pubkey(key)?;
    Ok(builder)
}
