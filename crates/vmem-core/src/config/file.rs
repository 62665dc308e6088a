//! A configuration from a file, with the feature `serde`.
//!
//! Invariant: what is read goes through the builder, so it is checked as any other; a field that is not
//! known is an error, since it is a typing error more often than not. Called by serde.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use serde::de::{Deserialize, Deserializer, Error};

use super::{GpuSelection, Promotion, VirtualMemoryConfig, VirtualMemoryConfigBuilder};
use crate::policy::PolicyKind;

/// The fields by the names of their setters; one that is missing has its default.
#[derive(Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    disk_path: Option<PathBuf>,
    host_capacity: Option<ByteSize>,
    staging_capacity: Option<ByteSize>,
    disk_capacity: Option<ByteSize>,
    vram_capacity: Option<ByteSize>,
    gpu: Option<Gpu>,
    io_driver: Option<String>,
    watermarks: Option<(f64, f64)>,
    max_pinned: Option<f64>,
    policy: Option<String>,
    promotion: Option<Promote>,
    catalog_cache: Option<ByteSize>,
    #[serde(with = "humantime_serde")]
    wait_timeout: Option<Duration>,
}

/// `"auto"`, `"off"`, an ordinal, or the text of a UUID.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Gpu {
    Device(usize),
    Word(String),
}

/// `"never"`, or at which read.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Promote {
    OnNthRead(u32),
    Word(String),
}

impl<'de> Deserialize<'de> for VirtualMemoryConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Fields::deserialize(deserializer)?;
        builder(fields).map_err(D::Error::custom)?.build().map_err(D::Error::custom)
    }
}

fn builder(fields: Fields) -> Result<VirtualMemoryConfigBuilder, String> {
    let mut builder = VirtualMemoryConfig::builder();
    let bytes = |size: Option<ByteSize>| size.map(|size| size.as_u64());
    builder.disk_path = fields.disk_path;
    builder.host_capacity = bytes(fields.host_capacity);
    builder.staging_capacity = bytes(fields.staging_capacity);
    builder.disk_capacity = bytes(fields.disk_capacity);
    builder.vram_capacity = bytes(fields.vram_capacity);
    if let Some(gpu) = fields.gpu {
        builder.gpu = match gpu {
            Gpu::Device(ordinal) => GpuSelection::Device(ordinal),
            Gpu::Word(word) if word == "auto" => GpuSelection::Auto,
            Gpu::Word(word) if word == "off" => GpuSelection::Off,
            Gpu::Word(uuid) => GpuSelection::Uuid(uuid),
        };
    }
    if let Some(driver) = fields.io_driver {
        builder.io_driver = driver.parse().map_err(|error| format!("{error}"))?;
    }
    if let Some(policy) = fields.policy {
        let kind = policy.parse::<PolicyKind>().map_err(|error| format!("{error}"))?;
        builder.policy = kind.into();
    }
    if let Some(promotion) = fields.promotion {
        builder.promotion = match promotion {
            Promote::OnNthRead(nth) => Promotion::OnNthRead(nth),
            Promote::Word(word) if word == "never" => Promotion::Never,
            Promote::Word(word) => {
                return Err(format!("promotion: a number of reads or \"never\", not {word:?}"));
            }
        };
    }
    builder.watermarks = fields.watermarks.unwrap_or(builder.watermarks);
    builder.max_pinned = fields.max_pinned.unwrap_or(builder.max_pinned);
    builder.catalog_cache = bytes(fields.catalog_cache).unwrap_or(builder.catalog_cache);
    builder.wait_timeout = fields.wait_timeout.unwrap_or(builder.wait_timeout);
    Ok(builder)
}
