//! The configuration: a file in TOML, and the environment over it.
//!
//! Invariant: a field that is not known is refused by its name, whether the file or the environment
//! has it, and what was read has been checked: nothing that starts later finds it unusable. Called
//! by the program and by tests.

mod checks;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};
use vmem::VirtualMemoryConfig;

/// What begins the names of the variables; `__` stands between a table and its field.
pub const ENV_PREFIX: &str = "VMEM_SERVICE_";
/// The variable with the path of the file, which is no field.
pub const ENV_FILE: &str = "VMEM_SERVICE_CONFIG";

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the service listens. Default: `127.0.0.1:8080`, which no other machine reaches.
    pub listen: SocketAddr,
    /// Names that the service answers to, besides those of this machine, and whose pages may change
    /// objects: its own, and those of a proxy that passes them on, without a port. Default: none;
    /// then it answers to any name where it does not listen on loopback.
    pub names: Vec<String>,
    /// Which clients see the live page below `/dashboard/`. Default: `"loopback"`.
    pub dashboard: DashboardAccess,
    /// What requests may take.
    pub limits: Limits,
    /// Where spans go, besides the log.
    pub otlp: Otlp,
    /// The store. `disk_path` has to be set, so that objects survive a restart.
    pub store: VirtualMemoryConfig,
}

/// Which clients see the dashboard. It has names of objects, sizes, times and errors, and no bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DashboardAccess {
    /// None: there is no such path.
    Off,
    /// Those of this machine, under a name of this machine.
    #[default]
    Loopback,
    /// All that reach the service.
    All,
}

/// Spans for an OpenTelemetry collector, by OTLP over HTTP.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Otlp {
    /// The collector, such as `http://127.0.0.1:4318`; spans go to `/v1/traces` below it. Default:
    /// none, and no span is sent.
    pub endpoint: Option<String>,
    /// What the collector calls this service. Default: `vmem-service`.
    pub service_name: String,
    /// The part of traces that is sent, of those that begin here; a caller's trace is sent if the
    /// caller says that it is. Default: 1, which is all.
    pub sample_ratio: f64,
    /// How long the collector may take for an answer, and the end of the service for spans that
    /// are still to be sent. Default: 5 s.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

/// What requests may take. Sizes are in bytes, or words such as `"64MiB"`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The largest object. Default: 1 GiB.
    #[serde(deserialize_with = "size")]
    pub max_object: u64,
    /// Connections that are open at once; others wait to be accepted. Default: 4,096.
    pub max_connections: usize,
    /// Of them, those of one address, or of one /64 of IPv6; others are closed at once. 0 is no
    /// limit of its own, as behind a proxy. Default: 1,024.
    pub max_connections_per_client: usize,
    /// Requests that are served at once, to the end of their bodies; others get 503.
    /// Default: 1,024.
    pub max_requests: usize,
    /// Of them, those of one address, or of one /64 of IPv6; others get 429. 0 is no limit of its
    /// own, as behind a proxy. Default: 256, a quarter of the default of `max_requests`.
    pub max_requests_per_client: usize,
    /// Items of one page of a listing, which besides has about 1 MiB at most. Default: 1,000.
    pub max_listed: usize,
    /// Headers of a request, in bytes, 8 KiB at least. Default: 32 KiB.
    #[serde(deserialize_with = "size")]
    pub max_headers: u64,
    /// How long a client may take over its headers, or be idle. Default: 30 s.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// In each such time a body that is sent has to bring `body_progress`. Default: 30 s.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// The bytes that a body has to bring in each `body_timeout`. Default: 1 KiB.
    #[serde(deserialize_with = "size")]
    pub body_progress: u64,
    /// The bytes in a second that a client has to send of a body, or take of a response, in the
    /// mean; 0 if any rate will do. Default: 16 KiB.
    #[serde(deserialize_with = "size")]
    pub min_rate: u64,
    /// How far a client may be behind `min_rate`: a body of `n` bytes takes at most this and
    /// `n / min_rate`, besides the time of the store. Default: 60 s.
    #[serde(with = "humantime_serde")]
    pub rate_grace: Duration,
    /// How long a client may take no byte of a response. Default: 30 s.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// What the kernel keeps of a response for a client that does not read, in bytes, up to what
    /// the system allows; it counts against the memory limit of the process. 0 leaves it to the
    /// kernel, which may take several MiB for each. Default: 256 KiB.
    #[serde(deserialize_with = "size")]
    pub send_buffer: u64,
    /// Memory, in bytes, for responses of at most 256 KiB, which are read at once into memory of
    /// their own; when it is used up they are streamed, as longer ones are. Default: 32 MiB.
    #[serde(deserialize_with = "size")]
    pub max_copied: u64,
    /// The longest pin. Default: 1 h.
    #[serde(with = "humantime_serde")]
    pub max_pin: Duration,
    /// Pins at once; others get 503. Default: 1,024.
    pub max_pins: usize,
    /// Prefetches at once; others get 503. Default: 64.
    pub max_prefetches: usize,
    /// How long a prefetch may run. Default: 5 min.
    #[serde(with = "humantime_serde")]
    pub prefetch_timeout: Duration,
    /// How long requests may go on once the service is to end. Default: 30 s.
    #[serde(with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// What `Retry-After` says. Default: 1 s.
    #[serde(with = "humantime_serde")]
    pub retry_after: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            names: Vec::new(),
            dashboard: DashboardAccess::default(),
            limits: Limits::default(),
            otlp: Otlp::default(),
            store: VirtualMemoryConfig::default(),
        }
    }
}

impl Default for Otlp {
    fn default() -> Self {
        Otlp {
            endpoint: None,
            service_name: "vmem-service".into(),
            sample_ratio: 1.0,
            timeout: Duration::from_secs(5),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Limits {
            max_object: 1 << 30,
            max_connections: 4096,
            max_connections_per_client: 1024,
            max_requests: 1024,
            max_requests_per_client: 256,
            max_listed: 1000,
            max_headers: 32 << 10,
            header_timeout: seconds(30),
            body_timeout: seconds(30),
            body_progress: 1 << 10,
            min_rate: 16 << 10,
            rate_grace: seconds(60),
            write_timeout: seconds(30),
            send_buffer: 256 << 10,
            max_copied: 32 << 20,
            max_pin: seconds(3600),
            max_pins: 1024,
            max_prefetches: 64,
            prefetch_timeout: seconds(300),
            drain_timeout: seconds(30),
            retry_after: seconds(1),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file says something that is not understood.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// The line, and why.
        reason: String,
    },
    /// A variable says something that is not understood.
    #[error("{variable}: {reason}")]
    Variable {
        /// Its name.
        variable: String,
        /// Why.
        reason: String,
    },
    /// A value cannot be used.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Why.
        reason: &'static str,
    },
}

impl Config {
    /// Reads a file, if there is to be one, and these variables over it.
    ///
    /// # Errors
    ///
    /// With the file and its line, the variable, or the field.
    pub fn read(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, ConfigError> {
        let mut table = match file {
            Some(path) => read_file(path)?,
            None => Table::new(),
        };
        let ours = variables
            .into_iter()
            .filter(|(name, _)| name.starts_with(ENV_PREFIX) && name != ENV_FILE);
        // One after the other, so that an error names its variable.
        for (variable, text) in ours.collect::<BTreeMap<_, _>>() {
            let refused = |reason| ConfigError::Variable { variable: variable.clone(), reason };
            let path = variable[ENV_PREFIX.len()..].to_ascii_lowercase();
            set(&mut table, &path, value_of(&text)).map_err(refused)?;
            let parsed = table.clone().try_into::<Config>();
            parsed.map_err(|error| refused(error.to_string().trim().to_owned()))?;
        }
        let config: Config = table.try_into().map_err(|error| ConfigError::File {
            path: "configuration".into(),
            reason: error.to_string(),
        })?;
        config.check()?;
        Ok(config)
    }

    /// The effective values, as a file would have them.
    ///
    /// # Errors
    ///
    /// If a file cannot say them.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// # Errors
    ///
    /// `Invalid` for the first field that cannot be used.
    pub fn check(&self) -> Result<(), ConfigError> {
        checks::check(self)
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { path: shown.clone(), source })?;
    let refused = |error: toml::de::Error| ConfigError::File {
        path: shown.clone(),
        reason: error.to_string().trim_end().to_owned(),
    };
    // By itself first: then an error has its line.
    toml::from_str::<Config>(&text).map_err(refused)?;
    toml::from_str(&text).map_err(refused)
}

/// A value as TOML has it, or else the text itself: `64MiB` needs no quotes here.
fn value_of(text: &str) -> Value {
    let parsed = toml::from_str::<Table>(&format!("value = {text}"));
    let value = parsed.ok().and_then(|mut table| table.remove("value"));
    value.filter(|value| !value.is_datetime()).unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Sets the field at `table__field`.
fn set(table: &mut Table, path: &str, value: Value) -> Result<(), String> {
    let Some((first, rest)) = path.split_once("__") else {
        table.insert(path.to_owned(), value);
        return Ok(());
    };
    let inner = table.entry(first).or_insert_with(|| Value::Table(Table::new()));
    let inner = inner.as_table_mut().ok_or_else(|| format!("{first} has no fields"))?;
    set(inner, rest, value)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    ByteSize::deserialize(deserializer).map(|size| size.as_u64())
}
