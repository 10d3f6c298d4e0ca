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
    rsa::Rsa,
    ssl::{SslConnector, SslMethod},
    symm::Cipher,
    x509::{
        X509, X509Builder, X509NameBuilder, X509Ref,
        extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName},
    },
};
use postgres_openssl::MakeTlsConnector;

/// Days that certificates are valid for.
const VALIDITY: u32 = 30;

/// Signs certificates. Its key is never written to disk.
pub struct Authority {
    name: String,
    certificate: X509,
    key: PKey<Private>,
    /// What goes along with the certificates that it issues: all between them and their root.
    between: Vec<X509>,
    /// By role. Making one reads all certificates that the system trusts, which costs more than a connection.
    connectors: Mutex<HashMap<String, MakeTlsConnector>>,
}

/// A certificate and its key.
pub struct Identity {
    certificate: X509,
    between: Vec<X509>,
    key: PKey<Private>,
}

impl Identity {
    /// The certificate and those between it and its root as PEM.
    pub fn certificate_pem(&self) -> Result<Vec<u8>> {
        let mut pem = self.certificate.to_pem()?;
        for certificate in &self.between {
            pem.extend(certificate.to_pem()?);
        }
        Ok(pem)
    }

    /// Its serial number, hexadecimal.
    pub fn serial(&self) -> Result<String> {
        serial(&self.certificate)
    }

    /// The key as PEM, encrypted.
    pub fn encrypted_key_pem(&self) -> Result<Vec<u8>> {
        Ok(self.key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), b"secret")?)
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
        Self::named("stillebot test authority")
    }

    /// The same, of another name.
    pub fn named(name: &str) -> Result<Self> {
        let key = new_key()?;
        let certificate = sign_authority(name, &key, name, &key)?;
        Ok(Self { name: name.to_owned(), certificate, key, between: Vec::new(), connectors: Mutex::default() })
    }

    /// An authority that this one vouches for.
    pub fn subordinate(&self, name: &str) -> Result<Self> {
        let key = new_key()?;
        let certificate = sign_authority(name, &key, &self.name, &self.key)?;
        let between = std::iter::once(certificate.clone()).chain(self.between.iter().cloned()).collect();
        Ok(Self { name: name.to_owned(), certificate, key, between, connectors: Mutex::default() })
    }

    /// Vouched for by another one as well: what it issues comes with that certificate.
    pub fn cross_signed_by(mut self, other: &Self) -> Result<Self> {
        self.between.push(sign_authority(&self.name, &self.key, &other.name, &other.key)?);
        Ok(self)
    }

    /// A certificate for these names or addresses, to be described further.
    pub fn request<'a>(&'a self, names: &'a [&'a str]) -> Request<'a> {
        let common_name = names.first().copied().unwrap_or("nobody");
        let validity = [-3600, 90 * 86_400];
        Request { authority: self, names, common_name, validity, rsa: false, servers_only: false }
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
        Ok(Identity { certificate: builder.build(), between: self.between.clone(), key })
    }
}

/// What a certificate is to be like. For servers and clients, valid from an hour ago for 90 days, with an elliptic key, unless
/// said otherwise.
pub struct Request<'a> {
    authority: &'a Authority,
    names: &'a [&'a str],
    common_name: &'a str,
    validity: [i64; 2],
    rsa: bool,
    servers_only: bool,
}

impl<'a> Request<'a> {
    /// The role that it logs in as; empty: it has no common name.
    pub fn role(mut self, role: &'a str) -> Self {
        self.common_name = role;
        self
    }

    /// Begin and end, in seconds from now.
    pub fn valid(mut self, from: i64, to: i64) -> Self {
        self.validity = [from, to];
        self
    }

    /// With an RSA key.
    pub fn rsa(mut self) -> Self {
        self.rsa = true;
        self
    }

    /// No client may use it.
    pub fn servers_only(mut self) -> Self {
        self.servers_only = true;
        self
    }

    /// Signs it.
    pub fn issue(self) -> Result<Identity> {
        let key = if self.rsa { PKey::from_rsa(Rsa::generate(2048)?)? } else { new_key()? };
        let mut builder = start(self.common_name, &key)?;
        let now = i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs())?;
        let [from, to] = self.validity.map(|offset| Asn1Time::from_unix(now + offset));
        builder.set_not_before(from?.as_ref())?;
        builder.set_not_after(to?.as_ref())?;
        builder.set_issuer_name(self.authority.certificate.subject_name())?;
        let mut names = SubjectAlternativeName::new();
        for name in self.names {
            if name.parse::<IpAddr>().is_ok() {
                names.ip(name)
            } else {
                names.dns(name)
            };
        }
        let extension = names.build(&builder.x509v3_context(Some(&self.authority.certificate), None))?;
        builder.append_extension(extension)?;
        let mut usage = ExtendedKeyUsage::new();
        usage.server_auth();
        if !self.servers_only {
            usage.client_auth();
        }
        builder.append_extension(usage.build()?)?;
        builder.sign(&self.authority.key, MessageDigest::sha256())?;
        Ok(Identity { certificate: builder.build(), between: self.authority.between.clone(), key })
    }
}

/// A serial number, hexadecimal.
pub(crate) fn serial(certificate: &X509Ref) -> Result<String> {
    Ok(certificate.serial_number().to_bn()?.to_hex_str()?.to_string())
}

fn sign_authority(name: &str, key: &PKey<Private>, issuer: &str, issuer_key: &PKey<Private>) -> Result<X509> {
    let mut builder = start(name, key)?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    let issuer = builder_subject(issuer)?;
    builder.set_issuer_name(issuer.as_ref())?;
    builder.sign(issuer_key, MessageDigest::sha256())?;
    Ok(builder.build())
}

fn new_key() -> Result<PKey<Private>> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?).context("no key")
}

fn builder_subject(common_name: &str) -> Result<openssl::x509::X509Name> {
    let mut name = X509NameBuilder::new()?;
    // As some authorities have it: no common name at all.
    if !common_name.is_empty() {
        name.append_entry_by_nid(Nid::COMMONNAME, common_name)?;
    }
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
