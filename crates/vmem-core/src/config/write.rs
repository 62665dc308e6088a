//! A configuration to a file, with the feature `serde`.
//!
//! Invariant: what is written is read as the same configuration again; what no file can say is an
//! error and never left out. Called by serde.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::ser::{Error, Serialize, Serializer};

use super::{Budget, GpuSelection, Promotion, SwitchPoints, VirtualMemoryConfig, WriteBack};
use crate::policy::PolicyChoice;

/// The fields by the names of their setters; those that are not set are left out.
#[derive(serde::Serialize)]
struct Fields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_path: Option<&'a Path>,
    #[serde(skip_serializing_if = "is_default")]
    allow_foreign_files: bool,
    #[serde(skip_serializing_if = "is_default")]
    host_capacity: Budget,
    #[serde(skip_serializing_if = "Option::is_none")]
    staging_capacity: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_capacity: Option<u64>,
    #[serde(skip_serializing_if = "is_default")]
    disk_capacity: Budget,
    #[serde(skip_serializing_if = "is_default")]
    vram_capacity: Budget,
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_capacities: Option<&'a [Budget]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<&'a GpuSelection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpus: Option<&'a [GpuSelection]>,
    io_driver: String,
    watermarks: (f64, f64),
    max_pinned: f64,
    max_held: f64,
    policy: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_policies: Option<Vec<String>>,
    promotion: Promotion,
    #[serde(serialize_with = "gathers")]
    gather_promotion: Promotion,
    write_back: String,
    #[serde(skip_serializing_if = "is_default")]
    switch_points: SwitchPoints,
    catalog_cache: u64,
    #[serde(with = "humantime_serde")]
    wait_timeout: Duration,
    #[serde(with = "humantime_serde")]
    slow_read_threshold: Duration,
    spans_per_second: u32,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Serialize for VirtualMemoryConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fields = &self.fields;
        let word = |policy: &PolicyChoice| match policy.kind() {
            Some(_) => Ok(policy.to_string()),
            None => {
                let name = policy.to_string();
                let why = format!("the policy {name:?} is of the program, no file can name it");
                Err(S::Error::custom(why))
            }
        };
        let policy = word(&fields.policy)?;
        let vram_policy = fields.vram_policy.as_ref().map(word).transpose()?;
        let each = fields.vram_policies.as_ref();
        let vram_policies = each.map(|each| each.iter().map(word).collect()).transpose()?;
        let (gpu, gpus) = match &fields.gpus[..] {
            [one] => (Some(one), None),
            several => (None, Some(several)),
        };
        let written = Fields {
            disk_path: fields.disk_path.as_deref(),
            allow_foreign_files: fields.allow_foreign_files,
            host_capacity: fields.host_capacity,
            staging_capacity: fields.staging_capacity,
            stream_capacity: fields.stream_capacity,
            disk_capacity: fields.disk_capacity,
            vram_capacity: fields.vram_capacity,
            vram_capacities: fields.vram_capacities.as_deref(),
            gpu,
            gpus,
            io_driver: fields.io_driver.to_string(),
            watermarks: fields.watermarks,
            max_pinned: fields.max_pinned,
            max_held: fields.max_held,
            policy,
            vram_policy,
            vram_policies,
            promotion: fields.promotion,
            gather_promotion: fields.gather_promotion,
            write_back: match fields.write_back {
                WriteBack::Eager => "eager".to_owned(),
                WriteBack::OnEvict => "on-evict".to_owned(),
                WriteBack::After(after) => {
                    humantime_serde::re::humantime::format_duration(after).to_string()
                }
            },
            switch_points: fields.switch_points,
            catalog_cache: fields.catalog_cache,
            wait_timeout: fields.wait_timeout,
            slow_read_threshold: fields.slow_read_threshold,
            spans_per_second: fields.spans_per_second,
        };
        written.serialize(serializer)
    }
}

impl Serialize for Budget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Budget::Default => serializer.serialize_none(),
            Budget::Bytes(bytes) => serializer.serialize_u64(*bytes),
            Budget::Percent(_) => serializer.collect_str(self),
        }
    }
}

impl Serialize for GpuSelection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            GpuSelection::Device(ordinal) => serializer.serialize_u64(*ordinal as u64),
            // A text that no device has as its UUID may read as something else.
            other if GpuSelection::from_str(&other.to_string()).ok().as_ref() != Some(other) => {
                Err(S::Error::custom(format!("{other:?} names no device")))
            }
            other => serializer.collect_str(other),
        }
    }
}

impl Serialize for Promotion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Promotion::OnNthRead(nth) => serializer.serialize_u32(*nth),
            Promotion::OnNthGather(_) | Promotion::Never => serializer.collect_str(self),
        }
    }
}

/// The rule for gathers, by their number alone.
fn gathers<S: Serializer>(rule: &Promotion, serializer: S) -> Result<S::Ok, S::Error> {
    match rule {
        Promotion::OnNthGather(nth) => serializer.serialize_u32(*nth),
        other => other.serialize(serializer),
    }
}
