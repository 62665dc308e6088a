//! A configuration from a file, with the feature `serde`.
//!
//! Invariant: what is read goes through the builder, so it is checked as any other; a field that is
//! not known is an error, since it is probably a typing error. An error says what is accepted, in
//! the words of the configuration. Called by serde.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

use super::{
    Budget, GpuSelection, Promotion, SwitchPoints, VirtualMemoryConfig, VirtualMemoryConfigBuilder,
    WriteBack,
};
use crate::policy::{PolicyChoice, PolicyKind};

/// The fields by the names of their setters; one that is missing has its default.
#[derive(Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    disk_path: Option<PathBuf>,
    allow_foreign_files: Option<bool>,
    host_capacity: Option<Budget>,
    staging_capacity: Option<Size>,
    stream_capacity: Option<Size>,
    disk_capacity: Option<Budget>,
    vram_capacity: Option<Budget>,
    vram_capacities: Option<Vec<Budget>>,
    gpu: Option<GpuSelection>,
    gpus: Option<Vec<GpuSelection>>,
    io_driver: Option<String>,
    watermarks: Option<(f64, f64)>,
    max_pinned: Option<f64>,
    max_held: Option<f64>,
    policy: Option<String>,
    vram_policy: Option<String>,
    vram_policies: Option<Vec<String>>,
    promotion: Option<Promotion>,
    gather_promotion: Option<Gathers>,
    write_back: Option<String>,
    switch_points: Option<SwitchPoints>,
    catalog_cache: Option<Size>,
    #[serde(with = "humantime_serde")]
    wait_timeout: Option<Duration>,
    #[serde(with = "humantime_serde")]
    slow_read_threshold: Option<Duration>,
    spans_per_second: Option<u32>,
}

/// A value that is a whole number or a word.
trait NumberOrWord: Sized {
    /// What is accepted, for errors.
    const EXPECTED: &'static str;

    /// The value of a number; `None` if it is not valid.
    fn of_number(number: u64) -> Option<Self>;

    /// The value of a word; `None` if it is not valid.
    fn of_word(word: &str) -> Option<Self>;
}

/// Reads a [`NumberOrWord`].
struct Reads<T>(std::marker::PhantomData<T>);

impl<T: NumberOrWord> Visitor<'_> for Reads<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        let refused = || E::invalid_value(Unexpected::Unsigned(number), &T::EXPECTED);
        T::of_number(number).ok_or_else(refused)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &T::EXPECTED)),
        }
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<T, E> {
        let refused = || E::invalid_value(Unexpected::Str(word), &T::EXPECTED);
        T::of_word(word).ok_or_else(refused)
    }
}

/// Implements `Deserialize` by [`Reads`].
macro_rules! read_as_number_or_word {
    ($($of:ty),+) => {$(
        impl<'de> Deserialize<'de> for $of {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Reads(std::marker::PhantomData))
            }
        }
    )+};
}

read_as_number_or_word!(Size, Budget, GpuSelection, Promotion, Gathers);

/// A size in bytes.
struct Size(u64);

impl NumberOrWord for Size {
    const EXPECTED: &'static str = "a size in bytes, such as 1048576, \"512MiB\" or \"1.5 GB\"";

    fn of_number(number: u64) -> Option<Self> {
        Some(Size(number))
    }

    fn of_word(word: &str) -> Option<Self> {
        word.trim().parse::<ByteSize>().ok().map(|size| Size(size.as_u64()))
    }
}

impl NumberOrWord for Budget {
    const EXPECTED: &'static str = "a size in bytes, such as 1048576, \"512MiB\" or \
                                     \"1.5 GB\", or a percentage, such as \"25%\"";

    fn of_number(number: u64) -> Option<Self> {
        Some(Budget::Bytes(number))
    }

    fn of_word(word: &str) -> Option<Self> {
        match word.trim().strip_suffix('%') {
            // The builder checks its range.
            Some(percent) => percent.trim_end().parse().ok().map(Budget::Percent),
            None => Size::of_word(word).map(|Size(bytes)| Budget::Bytes(bytes)),
        }
    }
}

impl NumberOrWord for GpuSelection {
    const EXPECTED: &'static str = "\"auto\", \"off\", an ordinal such as 0, or a UUID";

    fn of_number(number: u64) -> Option<Self> {
        Some(GpuSelection::Device(usize::try_from(number).ok()?))
    }

    fn of_word(word: &str) -> Option<Self> {
        word.parse().ok()
    }
}

impl NumberOrWord for Promotion {
    const EXPECTED: &'static str =
        "the number of a read from 1 on, \"gather:2\" with that of a gather, or \"never\"";

    fn of_number(number: u64) -> Option<Self> {
        let nth = u32::try_from(number).ok().filter(|&nth| nth > 0)?;
        Some(Promotion::OnNthRead(nth))
    }

    fn of_word(word: &str) -> Option<Self> {
        word.parse().ok()
    }
}

/// When a gather promotes.
struct Gathers(Promotion);

impl NumberOrWord for Gathers {
    const EXPECTED: &'static str = "the number of a gather from 1 on, or \"never\"";

    fn of_number(number: u64) -> Option<Self> {
        let nth = u32::try_from(number).ok().filter(|&nth| nth > 0)?;
        Some(Gathers(Promotion::OnNthGather(nth)))
    }

    fn of_word(word: &str) -> Option<Self> {
        match word {
            "never" => Some(Gathers(Promotion::Never)),
            number => Gathers::of_number(number.parse().ok()?),
        }
    }
}

impl<'de> Deserialize<'de> for VirtualMemoryConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Fields::deserialize(deserializer)?;
        builder(fields).map_err(D::Error::custom)?.build().map_err(D::Error::custom)
    }
}

fn builder(fields: Fields) -> Result<VirtualMemoryConfigBuilder, String> {
    let mut builder = VirtualMemoryConfig::builder();
    let bytes = |size: Option<Size>| size.map(|size| size.0);
    builder.disk_path = fields.disk_path;
    builder.allow_foreign_files = fields.allow_foreign_files.unwrap_or_default();
    builder.host_capacity = fields.host_capacity.unwrap_or_default();
    builder.staging_capacity = bytes(fields.staging_capacity);
    builder.stream_capacity = bytes(fields.stream_capacity);
    builder.disk_capacity = fields.disk_capacity.unwrap_or_default();
    if fields.vram_capacity.is_some() && fields.vram_capacities.is_some() {
        return Err("vram_capacity and vram_capacities say the same: one is enough".to_owned());
    }
    builder.vram_capacity = fields.vram_capacity.unwrap_or_default();
    builder.vram_capacities = fields.vram_capacities;
    builder.gpus = match (fields.gpu, fields.gpus) {
        (Some(_), Some(_)) => {
            return Err("gpu and gpus say the same: one of them is enough".to_owned());
        }
        (Some(gpu), None) => vec![gpu],
        (None, Some(gpus)) => gpus,
        (None, None) => builder.gpus,
    };
    if let Some(driver) = fields.io_driver {
        builder.io_driver = driver.parse().map_err(|error| format!("{error}"))?;
    }
    let policy = |word: String| match word.parse::<PolicyKind>() {
        Ok(kind) => Ok(PolicyChoice::from(kind)),
        Err(error) => Err(format!("{error}")),
    };
    if let Some(word) = fields.policy {
        builder.policy = policy(word)?;
    }
    if fields.vram_policy.is_some() && fields.vram_policies.is_some() {
        return Err("vram_policy and vram_policies say the same: one is enough".to_owned());
    }
    builder.vram_policy = fields.vram_policy.map(policy).transpose()?;
    let each = fields.vram_policies.map(|words| words.into_iter().map(policy).collect());
    builder.vram_policies = each.transpose()?;
    match (fields.promotion, fields.gather_promotion) {
        (Some(Promotion::OnNthGather(_)), Some(_)) => {
            return Err("promotion and gather_promotion say the same: one is enough".to_owned());
        }
        (promotion, gathers) => {
            builder = promotion.into_iter().fold(builder, VirtualMemoryConfigBuilder::promotion);
            if let Some(Gathers(gathers)) = gathers {
                builder.gather_promotion = gathers;
            }
        }
    }
    if let Some(word) = fields.write_back {
        builder.write_back = write_back(&word)?;
    }
    builder.switch_points = fields.switch_points.unwrap_or_default();
    builder.watermarks = fields.watermarks.unwrap_or(builder.watermarks);
    builder.max_pinned = fields.max_pinned.unwrap_or(builder.max_pinned);
    builder.max_held = fields.max_held.unwrap_or(builder.max_held);
    builder.catalog_cache = bytes(fields.catalog_cache).unwrap_or(builder.catalog_cache);
    builder.wait_timeout = fields.wait_timeout.unwrap_or(builder.wait_timeout);
    builder.slow_read_threshold = fields.slow_read_threshold.unwrap_or(builder.slow_read_threshold);
    builder.spans_per_second = fields.spans_per_second.unwrap_or(builder.spans_per_second);
    Ok(builder)
}

/// The choice of this word.
///
/// # Errors
///
/// What is accepted, for any other word.
fn write_back(word: &str) -> Result<WriteBack, String> {
    match word {
        "eager" => Ok(WriteBack::Eager),
        "on-evict" => Ok(WriteBack::OnEvict),
        after => match humantime_serde::re::humantime::parse_duration(after) {
            Ok(after) => Ok(WriteBack::After(after)),
            Err(_) => {
                let expected = "\"eager\", \"on-evict\", and after how long, such as \"250ms\"";
                Err(format!("write_back: {word:?} is none of {expected}"))
            }
        },
    }
}
