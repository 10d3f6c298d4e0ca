//! Certificates: reading them, and judging whether one will do. Pure.
//!
//! Deliberately opens no file and no connection, and never puts anything of a key into a text.

use std::collections::BTreeSet;
use std::net::IpAddr;

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::bn::BigNum;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509NameRef, X509PurposeId, X509Ref, X509StoreContext};
use serde::{Deserialize, Serialize};

use crate::config::{Config, Node, TlsMode, Use};

/// A certificate that is valid for less is not worth deploying.
const LEAST_LEFT: i64 = DAY;
/// From so many days before its end on, a certificate that nobody renewed is a warning.
pub const WARNING_DAYS: i64 = 21;
/// And from so many days on an error.
pub const ALARM_DAYS: i64 = 7;

const DAY: i64 = 86_400;
/// 1.3.6.1.4.1.11129.2.4.2, which names the extension of RFC 6962, section 3.3.
const LOG_RECEIPTS: [u8; 12] = [0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0xd6, 0x79, 0x02, 0x04, 0x02];

/// A certificate and those between it and its root.
#[derive(Clone)]
pub struct Chain {
    /// The certificate itself.
    pub leaf: X509,
    /// The others, in the order given.
    pub rest: Vec<X509>,
}

/// A chain and its key, as files.
pub struct Pair {
    /// The chain.
    pub chain: Chain,
    /// The certificates' file.
    pub cert: Vec<u8>,
    /// The key's file.
    pub key: Vec<u8>,
}

/// What a certificate says, fit to be shown and kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Names and addresses that it is issued for; the common name if there are none.
    pub names: Vec<String>,
    /// Who signed it.
    pub issuer: String,
    /// Begin of its validity, in seconds since 1970.
    pub not_before: i64,
    /// End of it.
    pub not_after: i64,
}

/// What a certificate has to be good for.
pub struct Wanted {
    /// PEM file of what its chain has to lead to.
    pub root: Vec<u8>,
    /// The same of the peers' subscriptions, which verify this node's server with a file of their own; none if it cannot be read
    /// here.
    pub peers_root: Option<Vec<u8>>,
    /// Who presents it.
    pub uses: BTreeSet<Use>,
    /// What it has to be issued for.
    pub names: Vec<String>,
}

/// Why a certificate will not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Flaw {
    /// Nobody may use it here.
    Useless(String),
    /// A server may, and a client not.
    ForServersOnly(String),
}

impl Flaw {
    /// Why.
    pub fn text(&self) -> &str {
        let (Self::Useless(text) | Self::ForServersOnly(text)) = self;
        text
    }
}

impl Use {
    /// It is presented to a server by a client of it.
    pub fn is_client(self) -> bool {
        matches!(self, Self::Replication | Self::Agent)
    }
}

/// How long something is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Term {
    /// Long enough.
    Well,
    /// So many days; somebody should look.
    Warning(i64),
    /// So many days; somebody must look.
    Alarm(i64),
    /// No longer.
    Expired,
    /// Not yet.
    Early,
}

impl Chain {
    /// Out of what a server presents, or of a file.
    pub fn of(certificates: Vec<X509>) -> Option<Self> {
        let mut rest = certificates;
        if rest.is_empty() {
            return None;
        }
        let leaf = rest.remove(0);
        Some(Self { leaf, rest })
    }

    /// Reads a file of certificates.
    pub fn read(pem: &[u8]) -> Result<Self, String> {
        X509::stack_from_pem(pem).ok().and_then(Self::of).ok_or_else(|| "it holds no PEM certificate".into())
    }

    /// What it says.
    pub fn facts(&self) -> Facts {
        Facts {
            serial: serial(&self.leaf),
            names: names(&self.leaf),
            issuer: name_text(self.leaf.issuer_name()),
            not_before: unix(self.leaf.not_before()),
            not_after: unix(self.leaf.not_after()),
        }
    }

    /// The common name, which PostgreSQL's `cert` authentication takes for the role.
    pub fn common_name(&self) -> Option<String> {
        let entry = self.leaf.subject_name().entries_by_nid(Nid::COMMONNAME).next();
        entry.and_then(|entry| entry.data().to_string().ok()).filter(|name| !name.is_empty())
    }

    /// Whether its purposes, if it has any, include that of a client.
    pub fn is_for_clients(&self) -> bool {
        let purpose = || -> Result<bool, openssl::error::ErrorStack> {
            let mut store = X509StoreBuilder::new()?;
            store.add_cert(self.leaf.clone())?;
            store.set_purpose(X509PurposeId::SSL_CLIENT)?;
            store.set_flags(X509VerifyFlags::PARTIAL_CHAIN | X509VerifyFlags::NO_CHECK_TIME)?;
            let (store, none) = (store.build(), Stack::new()?);
            X509StoreContext::new()?.init(&store, &self.leaf, &none, |context| context.verify_cert())
        };
        purpose().unwrap_or(false)
    }

    /// Whether a public authority has issued it: those put the receipts of public logs into each.
    pub fn is_public(&self) -> bool {
        let der = self.leaf.to_der().unwrap_or_default();
        der.windows(LOG_RECEIPTS.len()).any(|part| part == LOG_RECEIPTS)
    }

    /// The certificate out of these that the chain leads to, as PostgreSQL and libpq follow it. Without a use it may be for
    /// anything; `timeless` leaves out whether all of it is valid now.
    pub fn anchor(&self, roots: &[u8], purpose: Option<Use>, timeless: bool) -> Result<X509, String> {
        let roots = X509::stack_from_pem(roots).ok().filter(|roots| !roots.is_empty());
        let roots = roots.ok_or("the root file holds no PEM certificate")?;
        let verify = || -> Result<Result<X509, String>, openssl::error::ErrorStack> {
            let mut store = X509StoreBuilder::new()?;
            for root in &roots {
                store.add_cert(root.clone())?;
            }
            match purpose {
                Some(Use::Server) => store.set_purpose(X509PurposeId::SSL_SERVER)?,
                Some(Use::Replication | Use::Agent) => store.set_purpose(X509PurposeId::SSL_CLIENT)?,
                Some(Use::Other) | None => {}
            }
            if timeless {
                store.set_flags(X509VerifyFlags::NO_CHECK_TIME)?;
            }
            let mut between = Stack::new()?;
            for certificate in &self.rest {
                between.push(certificate.clone())?;
            }
            let mut context = X509StoreContext::new()?;
            context.init(&store.build(), &self.leaf, &between, |context| {
                let good = context.verify_cert()?;
                let anchor = context.chain().and_then(|chain| chain.iter().last().map(ToOwned::to_owned));
                Ok(match anchor {
                    Some(anchor) if good => Ok(anchor),
                    _ => {
                        let at = context.current_cert().map(|at| name_text(at.subject_name())).unwrap_or_default();
                        Err(format!("{} (at {at})", context.error().error_string()))
                    }
                })
            })
        };
        verify().unwrap_or_else(|error| Err(error.to_string()))
    }
}

impl Pair {
    /// Reads both files; the error says why they are no pair.
    pub fn read(cert: Vec<u8>, key: Vec<u8>) -> Result<Self, String> {
        let chain = Chain::read(&cert).map_err(|flaw| format!("the certificate is of no use: {flaw}"))?;
        let mut asked = false;
        // The callback answers instead of a question on the terminal.
        let read = PKey::private_key_from_pem_callback(&key, |_| {
            asked = true;
            Ok(0)
        });
        let private = match read {
            Ok(private) if !asked => private,
            _ if asked => {
                return Err("the key is encrypted, and a server that starts by itself has nobody to ask for the \
                            passphrase"
                    .into());
            }
            _ => return Err("the key is of no use: it holds no PEM key".into()),
        };
        let belongs = chain.leaf.public_key().is_ok_and(|public| private.public_eq(&public));
        if !belongs {
            return Err("the key does not belong to the certificate".into());
        }
        Ok(Self { chain, cert, key })
    }

    /// Whether it will do at that moment, in seconds since 1970, in the place of what is there; the error says why not.
    pub fn judge(&self, wanted: &Wanted, present: Option<&Self>, now: i64) -> Result<(), Flaw> {
        self.lasts(now).map_err(Flaw::Useless)?;
        self.suits(wanted)?;
        let clients = wanted.uses.iter().any(|purpose| purpose.is_client());
        let had_one = present.is_none_or(|there| there.chain.common_name().is_some());
        if clients && had_one && self.chain.common_name().is_none() {
            let text =
                "the certificate has no common name, from which PostgreSQL's `cert` authentication takes the role";
            return Err(Flaw::ForServersOnly(text.into()));
        }
        // What would not be taken itself has no say: a placeholder may well be younger.
        if let Some(there) = present.filter(|there| there.suits(wanted).is_ok()) {
            let (facts, there) = (self.chain.facts(), there.chain.facts());
            if facts.not_before < there.not_before {
                return Err(Flaw::Useless(format!(
                    "the certificate is older than what is there: issued {}, not {}",
                    date(facts.not_before),
                    date(there.not_before)
                )));
            }
        }
        Ok(())
    }

    fn lasts(&self, now: i64) -> Result<(), String> {
        let facts = self.chain.facts();
        if facts.not_before > now {
            return Err(format!("the certificate is not valid before {}", date(facts.not_before)));
        }
        if facts.not_after < now {
            return Err(format!("the certificate expired on {}", date(facts.not_after)));
        }
        if facts.not_after - now <= LEAST_LEFT {
            return Err(format!(
                "the certificate expires on {}, in a day or less: it was not renewed",
                date(facts.not_after)
            ));
        }
        Ok(())
    }

    /// Root, purposes and names. Clients last: what they refuse, a server may still take.
    fn suits(&self, wanted: &Wanted) -> Result<(), Flaw> {
        let leads = |root: &[u8], purpose: Use, whose: &str| {
            self.chain.anchor(root, Some(purpose), false).map_err(|error| {
                // Not every authority issues them for clients; and then apply would stop at the next connection.
                if error.contains("purpose") && purpose.is_client() {
                    Flaw::ForServersOnly(format!("the certificate is not issued for a client: {error}"))
                } else if error.contains("purpose") {
                    Flaw::Useless(format!("the certificate is not issued for a server: {error}"))
                } else {
                    Flaw::Useless(format!("the chain does not lead to {whose}: {error}"))
                }
            })
        };
        for purpose in wanted.uses.iter().filter(|purpose| !purpose.is_client()) {
            leads(&wanted.root, *purpose, "the root")?;
        }
        if let Some(root) = wanted.peers_root.as_deref().filter(|_| wanted.uses.contains(&Use::Server)) {
            leads(root, Use::Server, "replication.root, by which its peers verify this server")?;
        }
        let missing = uncovered(&self.chain.facts().names, &wanted.names);
        if !missing.is_empty() {
            let (missing, names) = (missing.join(", "), names_text(&self.chain));
            return Err(Flaw::Useless(format!("the certificate is not issued for {missing}, only for {names}")));
        }
        for purpose in wanted.uses.iter().filter(|purpose| purpose.is_client()) {
            leads(&wanted.root, *purpose, "the root")?;
        }
        Ok(())
    }

    /// Whether both files are the same, byte by byte.
    pub fn is(&self, other: &Self) -> bool {
        self.cert == other.cert && self.key == other.key
    }
}

/// What a node's certificate has to be issued for, as far as somebody verifies it: the places where it is reached.
pub fn names_of(config: &Config, node: &Node) -> Vec<String> {
    let own = node.replication.host.as_ref().unwrap_or(&node.host);
    let verified = [(config.tls.mode, &node.host), (config.replication.mode, own)];
    let names: BTreeSet<&String> = verified
        .into_iter()
        .filter(|(mode, host)| *mode == TlsMode::VerifyFull && !host.starts_with('/'))
        .map(|(_, host)| host)
        .collect();
    names.into_iter().cloned().collect()
}

/// Those of the wanted names that none of the certificate's covers.
pub fn uncovered<'a>(names: &[String], wanted: &'a [String]) -> Vec<&'a str> {
    let covered = |wanted: &str| names.iter().any(|name| covers(name, wanted));
    wanted.iter().map(String::as_str).filter(|wanted| !covered(wanted)).collect()
}

/// As libpq compares: a star stands for one first label.
fn covers(name: &str, wanted: &str) -> bool {
    if let (Ok(name), Ok(wanted)) = (name.parse::<IpAddr>(), wanted.parse::<IpAddr>()) {
        return name == wanted;
    }
    if wanted.parse::<IpAddr>().is_ok() {
        return false;
    }
    let wanted = wanted.trim_end_matches('.');
    match name.strip_prefix("*.") {
        Some(domain) => wanted
            .split_once('.')
            .is_some_and(|(label, rest)| !label.is_empty() && !domain.is_empty() && rest.eq_ignore_ascii_case(domain)),
        None => name.eq_ignore_ascii_case(wanted),
    }
}

/// How a validity stands at a moment.
pub fn term(facts: &Facts, now: i64) -> Term {
    let left = facts.not_after - now;
    if facts.not_before > now {
        Term::Early
    } else if left < 0 {
        Term::Expired
    } else if left <= ALARM_DAYS * DAY {
        Term::Alarm(left / DAY)
    } else if left <= WARNING_DAYS * DAY {
        Term::Warning(left / DAY)
    } else {
        Term::Well
    }
}

/// A serial number as servers tell it, decimal, the way certificates do.
pub fn serial_of_decimal(decimal: &str) -> Option<String> {
    Some(BigNum::from_dec_str(decimal.trim()).ok()?.to_hex_str().ok()?.to_string())
}

fn serial(certificate: &X509Ref) -> String {
    let text =
        certificate.serial_number().to_bn().ok().and_then(|number| number.to_hex_str().ok().map(|t| t.to_string()));
    text.unwrap_or_default()
}

fn names(certificate: &X509Ref) -> Vec<String> {
    let mut names = Vec::new();
    for name in certificate.subject_alt_names().iter().flatten() {
        if let Some(dns) = name.dnsname() {
            names.push(dns.to_owned());
        } else if let Some(bytes) = name.ipaddress() {
            let address = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            names.extend(address.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).map(|ip| ip.to_string()));
        }
    }
    if names.is_empty() {
        let common = certificate.subject_name().entries_by_nid(Nid::COMMONNAME).next();
        names.extend(common.and_then(|entry| entry.data().to_string().ok()));
    }
    names
}

fn names_text(chain: &Chain) -> String {
    chain.facts().names.join(", ")
}

/// The common name, or all of it.
pub fn name_text(name: &X509NameRef) -> String {
    let text = |entry: &openssl::x509::X509NameEntryRef| entry.data().to_string().ok();
    if let Some(common) = name.entries_by_nid(Nid::COMMONNAME).next().and_then(text) {
        return common;
    }
    let parts: Vec<String> = name
        .entries()
        .filter_map(|entry| Some(format!("{}={}", entry.object().nid().short_name().ok()?, text(entry)?)))
        .collect();
    parts.join(", ")
}

/// Seconds since 1970.
fn unix(time: &Asn1TimeRef) -> i64 {
    let since = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time));
    since.map_or(0, |since| i64::from(since.days) * DAY + i64::from(since.secs))
}

/// A moment, for people.
pub fn date(seconds: i64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use openssl::asn1::{Asn1Object, Asn1OctetString};
    use openssl::ec::{EcGroup, EcKey};
    use openssl::hash::MessageDigest;
    use openssl::pkey::Private;
    use openssl::rsa::Rsa;
    use openssl::symm::Cipher;
    use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, SubjectAlternativeName};
    use openssl::x509::{X509Builder, X509Extension, X509NameBuilder};
    use proptest::prelude::*;

    pub(crate) fn now() -> i64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
    }

    pub(crate) fn elliptic() -> PKey<Private> {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
    }

    fn rsa() -> PKey<Private> {
        PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap()
    }

    pub(crate) struct Authority {
        name: &'static str,
        key: PKey<Private>,
        pub(crate) certificate: X509,
    }

    pub(crate) fn log_receipts(builder: &mut X509Builder) {
        let (name, value) =
            (Asn1Object::from_str("1.3.6.1.4.1.11129.2.4.2"), Asn1OctetString::new_from_bytes(b"\x04\0"));
        let extension = X509Extension::new_from_der(&name.unwrap(), false, &value.unwrap()).unwrap();
        builder.append_extension(extension).unwrap();
    }

    /// An empty one is left out.
    fn name(text: &str) -> openssl::x509::X509Name {
        let mut name = X509NameBuilder::new().unwrap();
        if text.is_empty() {
            name.append_entry_by_nid(Nid::ORGANIZATIONNAME, "nobody").unwrap();
        } else {
            name.append_entry_by_nid(Nid::COMMONNAME, text).unwrap();
        }
        name.build()
    }

    fn certificate(
        subject: &str,
        key: &PKey<Private>,
        issuer: (&str, &PKey<Private>),
        from: i64,
        to: i64,
        extend: impl FnOnce(&mut X509Builder),
    ) -> X509 {
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        let mut number = BigNum::new().unwrap();
        number.rand(100, openssl::bn::MsbOption::ONE, false).unwrap();
        builder.set_serial_number(&number.to_asn1_integer().unwrap()).unwrap();
        builder.set_subject_name(&name(subject)).unwrap();
        builder.set_issuer_name(&name(issuer.0)).unwrap();
        builder.set_not_before(&Asn1Time::from_unix(from).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::from_unix(to).unwrap()).unwrap();
        builder.set_pubkey(key).unwrap();
        extend(&mut builder);
        builder.sign(issuer.1, MessageDigest::sha256()).unwrap();
        builder.build()
    }

    impl Authority {
        pub(crate) fn new(name: &'static str) -> Self {
            let key = elliptic();
            let certificate = Self::sign_authority(name, &key, (name, &key));
            Self { name, key, certificate }
        }

        fn sign_authority(name: &str, key: &PKey<Private>, issuer: (&str, &PKey<Private>)) -> X509 {
            certificate(name, key, issuer, now() - 9 * DAY, now() + 900 * DAY, |builder| {
                builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
            })
        }

        /// The same authority, signed by another one.
        fn signed_by(&self, other: &Self) -> X509 {
            Self::sign_authority(self.name, &self.key, (other.name, &other.key))
        }

        pub(crate) fn issue(&self, key: &PKey<Private>, names: &[&str], from: i64, to: i64, client: bool) -> X509 {
            certificate("leaf", key, (self.name, &self.key), from, to, |builder| {
                let mut alternative = SubjectAlternativeName::new();
                for name in names {
                    if name.parse::<IpAddr>().is_ok() {
                        alternative.ip(name)
                    } else {
                        alternative.dns(name)
                    };
                }
                let extension = alternative.build(&builder.x509v3_context(None, None)).unwrap();
                builder.append_extension(extension).unwrap();
                let mut usage = ExtendedKeyUsage::new();
                usage.server_auth();
                if client {
                    usage.client_auth();
                }
                builder.append_extension(usage.build().unwrap()).unwrap();
            })
        }
    }

    fn pem(certificates: &[&X509]) -> Vec<u8> {
        certificates.iter().flat_map(|certificate| certificate.to_pem().unwrap()).collect()
    }

    fn pair(key: &PKey<Private>, certificates: &[&X509]) -> Pair {
        Pair::read(pem(certificates), key.private_key_to_pem_pkcs8().unwrap()).unwrap()
    }

    fn wanted(authority: &Authority, uses: &[Use], names: &[&str]) -> Wanted {
        Wanted {
            root: pem(&[&authority.certificate]),
            peers_root: None,
            uses: uses.iter().copied().collect(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn flaw(pair: &Pair, wanted: &Wanted) -> String {
        pair.judge(wanted, None, now()).unwrap_err().text().to_owned()
    }

    #[test]
    fn rsa_and_elliptic_keys_are_read_and_belong_to_their_certificate_only() {
        let authority = Authority::new("root");
        for (key, other) in [(rsa(), elliptic()), (elliptic(), elliptic()), (elliptic(), rsa())] {
            let leaf = authority.issue(&key, &["a"], now() - 60, now() + 90 * DAY, true);
            for form in [key.private_key_to_pem_pkcs8().unwrap(), traditional(&key)] {
                assert!(Pair::read(pem(&[&leaf]), form).is_ok());
            }
            let wrong = Pair::read(pem(&[&leaf]), other.private_key_to_pem_pkcs8().unwrap()).err().unwrap();
            assert_eq!(wrong, "the key does not belong to the certificate");
        }
    }

    /// The form before PKCS#8.
    fn traditional(key: &PKey<Private>) -> Vec<u8> {
        match key.rsa() {
            Ok(rsa) => rsa.private_key_to_pem().unwrap(),
            Err(_) => key.ec_key().unwrap().private_key_to_pem().unwrap(),
        }
    }

    #[test]
    fn an_encrypted_key_is_refused_with_the_reason() {
        let authority = Authority::new("root");
        let key = rsa();
        let leaf = authority.issue(&key, &["a"], now() - 60, now() + 90 * DAY, true);
        for encrypted in [
            key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), b"secret").unwrap(),
            key.rsa().unwrap().private_key_to_pem_passphrase(Cipher::aes_256_cbc(), b"secret").unwrap(),
        ] {
            let flaw = Pair::read(pem(&[&leaf]), encrypted).err().unwrap();
            assert!(flaw.contains("the key is encrypted"), "{flaw}");
        }
        for nonsense in [&b""[..], b"no pem", &pem(&[&leaf])] {
            let flaw = Pair::read(pem(&[&leaf]), nonsense.to_vec()).err().unwrap();
            assert!(flaw.contains("holds no PEM key"), "{flaw}");
        }
        let flaw = Pair::read(b"no pem".to_vec(), key.private_key_to_pem_pkcs8().unwrap()).err().unwrap();
        assert!(flaw.contains("holds no PEM certificate"), "{flaw}");
    }

    #[test]
    fn a_chain_leads_to_the_root_through_what_comes_with_it() {
        let (root, between, stranger) = (Authority::new("root"), Authority::new("between"), Authority::new("stranger"));
        let signed = between.signed_by(&root);
        let key = elliptic();
        let leaf = between.issue(&key, &["a"], now() - 60, now() + 90 * DAY, true);
        let all = wanted(&root, &[Use::Server, Use::Replication], &["a"]);
        assert_eq!(pair(&key, &[&leaf, &signed]).judge(&all, None, now()), Ok(()));
        assert!(flaw(&pair(&key, &[&leaf]), &all).contains("does not lead to the root"));
        let foreign = wanted(&stranger, &[Use::Server], &["a"]);
        assert!(flaw(&pair(&key, &[&leaf, &signed]), &foreign).contains("does not lead to the root"));
    }

    /// As Let's Encrypt's were: the new root, signed by an old one that expires, comes with the chain.
    #[test]
    fn a_chain_with_cross_signed_certificates_leads_to_either_root() {
        let (old, new, between) = (Authority::new("old"), Authority::new("new"), Authority::new("between"));
        let (crossed, signed) = (new.signed_by(&old), between.signed_by(&new));
        let key = elliptic();
        let leaf = between.issue(&key, &["a"], now() - 60, now() + 90 * DAY, true);
        let pair = pair(&key, &[&leaf, &signed, &crossed]);
        for (root, anchor) in [(&old, "old"), (&new, "new")] {
            let found = pair.chain.anchor(&pem(&[&root.certificate]), Some(Use::Server), false).unwrap();
            assert_eq!(name_text(found.subject_name()), anchor);
        }
        let both = pem(&[&old.certificate, &new.certificate]);
        assert!(pair.chain.anchor(&both, None, false).is_ok());
    }

    #[test]
    fn a_certificate_for_servers_only_is_none_for_subscriptions() {
        let root = Authority::new("root");
        let key = elliptic();
        let leaf = root.issue(&key, &["a"], now() - 60, now() + 90 * DAY, false);
        let pair = pair(&key, &[&leaf]);
        assert_eq!(pair.judge(&wanted(&root, &[Use::Server], &["a"]), None, now()), Ok(()));
        assert!(!pair.chain.is_for_clients());
        for uses in [&[Use::Server, Use::Replication][..], &[Use::Agent]] {
            let flaw = pair.judge(&wanted(&root, uses, &["a"]), None, now()).unwrap_err();
            assert!(
                matches!(&flaw, Flaw::ForServersOnly(text) if text.contains("not issued for a client")),
                "{flaw:?}"
            );
        }
        // What no server may use either is not for servers only.
        let elsewhere = pair.judge(&wanted(&root, &[Use::Server, Use::Replication], &["b"]), None, now()).unwrap_err();
        assert!(matches!(elsewhere, Flaw::Useless(_)), "{elsewhere:?}");
    }

    #[test]
    fn a_client_needs_the_common_name_that_it_had() {
        let root = Authority::new("root");
        let key = elliptic();
        let issue = |common: &str| {
            let leaf = certificate(common, &key, (root.name, &root.key), now() - 60, now() + 90 * DAY, |_| ());
            assert!(Chain::of(vec![leaf.clone()]).unwrap().is_for_clients(), "without purposes it is for all");
            pair(&key, &[&leaf])
        };
        let (named, nameless) = (issue("replicator"), issue(""));
        assert_eq!(named.chain.common_name().as_deref(), Some("replicator"));
        let (client, server) = (wanted(&root, &[Use::Replication], &[]), wanted(&root, &[Use::Server], &[]));
        for there in [None, Some(&named)] {
            let flaw = nameless.judge(&client, there, now()).unwrap_err();
            assert!(matches!(&flaw, Flaw::ForServersOnly(text) if text.contains("no common name")), "{flaw:?}");
            assert_eq!(nameless.judge(&server, there, now()), Ok(()));
        }
        assert_eq!(nameless.judge(&client, Some(&nameless), now()), Ok(()));
        assert_eq!(named.judge(&client, Some(&nameless), now()), Ok(()));
    }

    #[test]
    fn a_servers_chain_leads_to_the_peers_root_too() {
        let (root, other) = (Authority::new("root"), Authority::new("other"));
        let key = elliptic();
        let pair = pair(&key, &[&root.issue(&key, &["a"], now() - 60, now() + 90 * DAY, true)]);
        let with = |peers: &Authority, uses: &[Use]| Wanted {
            peers_root: Some(pem(&[&peers.certificate])),
            ..wanted(&root, uses, &["a"])
        };
        assert_eq!(pair.judge(&with(&root, &[Use::Server]), None, now()), Ok(()));
        assert!(flaw(&pair, &with(&other, &[Use::Server])).contains("does not lead to replication.root"));
        assert_eq!(pair.judge(&with(&other, &[Use::Replication]), None, now()), Ok(()));
    }

    #[test]
    fn a_public_authoritys_certificate_is_known_by_its_receipts() {
        let root = Authority::new("root");
        let key = elliptic();
        let chain = |extend: fn(&mut X509Builder)| {
            let leaf = certificate("a", &key, (root.name, &root.key), now() - 60, now() + DAY, extend);
            Chain::of(vec![leaf]).unwrap()
        };
        assert!(!chain(|_| ()).is_public());
        assert!(chain(log_receipts).is_public());
    }

    #[test]
    fn validity_begins_lasts_and_is_not_older_than_what_is_there() {
        let root = Authority::new("root");
        let key = elliptic();
        let make = |from: i64, to: i64| pair(&key, &[&root.issue(&key, &["a"], from, to, true)]);
        let wanted = wanted(&root, &[Use::Server], &["a"]);
        let now = now();
        let judge = |pair: &Pair, there: Option<&Pair>| pair.judge(&wanted, there, now);
        assert!(judge(&make(now + 600, now + 90 * DAY), None).unwrap_err().text().contains("not valid before"));
        assert!(judge(&make(now - 90 * DAY, now - 1), None).unwrap_err().text().contains("expired on"));
        assert!(judge(&make(now - 90 * DAY, now + DAY), None).unwrap_err().text().contains("in a day or less"));
        assert_eq!(judge(&make(now - 90 * DAY, now + DAY + 60), None), Ok(()));
        let (older, newer) = (make(now - 60 * DAY, now + 30 * DAY), make(now - 60, now + 20 * DAY));
        assert_eq!(judge(&newer, Some(&older)), Ok(()));
        assert!(judge(&older, Some(&newer)).unwrap_err().text().contains("older than what is there"));
        assert_eq!(judge(&older, Some(&older)), Ok(()));
        // A placeholder that nobody would verify is replaced by whatever is good.
        let stranger = Authority::new("stranger");
        let placeholder = pair(&key, &[&stranger.issue(&key, &["a"], now - 5, now + 900 * DAY, true)]);
        assert_eq!(judge(&older, Some(&placeholder)), Ok(()));
    }

    #[test]
    fn names_cover_as_libpq_compares_them() {
        for (name, wanted, expected) in [
            ("a.example.net", "a.example.net", true),
            ("a.example.net", "A.Example.NET", true),
            ("a.example.net", "b.example.net", false),
            ("*.example.net", "a.example.net", true),
            ("*.example.net", "a.b.example.net", false),
            ("*.example.net", "example.net", false),
            ("*.", "a.", false),
            ("*", "a", false),
            ("127.0.0.1", "127.0.0.1", true),
            ("*.0.0.1", "127.0.0.1", false),
            ("::1", "0:0:0:0:0:0:0:1", true),
        ] {
            assert_eq!(covers(name, wanted), expected, "{name} {wanted}");
        }
        let root = Authority::new("root");
        let key = elliptic();
        let pair = pair(&key, &[&root.issue(&key, &["a.net", "10.0.0.1"], now() - 60, now() + 90 * DAY, true)]);
        assert_eq!(pair.chain.facts().names, ["a.net", "10.0.0.1"]);
        let flaw = flaw(&pair, &wanted(&root, &[Use::Server], &["a.net", "b.net", "10.0.0.2"]));
        assert_eq!(flaw, "the certificate is not issued for b.net, 10.0.0.2, only for a.net, 10.0.0.1");
    }

    #[test]
    fn the_end_is_announced_from_three_weeks_on() {
        let facts =
            Facts { serial: "1".into(), names: vec![], issuer: String::new(), not_before: 100, not_after: 100 * DAY };
        for (now, expected) in [
            (99, Term::Early),
            (100, Term::Well),
            (79 * DAY - 1, Term::Well),
            (79 * DAY, Term::Warning(21)),
            (93 * DAY - 1, Term::Warning(7)),
            (93 * DAY, Term::Alarm(7)),
            (100 * DAY, Term::Alarm(0)),
            (100 * DAY + 1, Term::Expired),
        ] {
            assert_eq!(term(&facts, now), expected, "{now}");
        }
    }

    #[test]
    fn a_serial_is_the_same_however_it_is_told() {
        let root = Authority::new("root");
        let key = elliptic();
        let leaf = root.issue(&key, &["a"], now() - 60, now() + DAY, true);
        let decimal = leaf.serial_number().to_bn().unwrap().to_dec_str().unwrap().to_string();
        assert_eq!(serial_of_decimal(&decimal), Some(serial(&leaf)));
        assert_eq!(serial_of_decimal("no number"), None);
    }

    #[test]
    fn a_node_has_to_be_covered_by_the_names_that_are_verified() {
        let parse = |text: &str| {
            let environment = crate::config::Environment { variable: &|_| None, os_user: Some("os".into()) };
            Config::parse(text, &environment).unwrap()
        };
        let names = |text: &str| {
            let config = parse(text);
            names_of(&config, &config.nodes[0])
        };
        let node = "[[node]]\nname='a'\nhost='a.net'\n";
        assert_eq!(names(node), ["a.net"]);
        assert_eq!(names(&format!("{node}[node.replication]\nhost='b.net'\n")), ["a.net", "b.net"]);
        assert_eq!(names(&format!("[tls]\nmode='require'\n{node}[node.replication]\nhost='b.net'\n")), ["b.net"]);
        assert_eq!(names("[[node]]\nname='a'\nhost='/run'\n"), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(cert in prop::collection::vec(any::<u8>(), 0..200), key in "\\PC{0,80}") {
            prop_assert!(Pair::read(cert, key.into_bytes()).is_err());
        }

        #[test]
        fn a_star_covers_one_label_and_nothing_else(label in "[a-z]{1,8}", more in "[a-z.]{0,8}") {
            let wanted = format!("{label}.{more}");
            prop_assert_eq!(covers("*.net", &wanted), more.trim_end_matches('.') == "net");
        }
    }
}
