//! The errors of a configuration file that cannot be read: they say what would do.
//!
//! Mechanism: the messages of libraries came through. Effect: -1 as a size was "integer overflow",
//! and a table for `gpu` "no variant of untagged enum Gpu". Fix: values that are a number or a word
//! say themselves what they expect.

use vmem::{GpuSelection, VirtualMemoryConfig};

fn refusal(text: &str) -> String {
    toml::from_str::<VirtualMemoryConfig>(text).unwrap_err().message().to_owned()
}

#[test]
fn refused_values_are_told_what_would_do() {
    let size = "a size in bytes, such as";
    for (text, expected) in [
        ("host_capacity = -1", size),
        ("host_capacity = true", size),
        ("disk_capacity = 1.5", size),
        ("catalog_cache = \"1 GiBi\"", size),
        ("vram_capacity = \"\"", size),
        ("staging_capacity = \"-1\"", size),
        ("host_capacity = \"25 per cent\"", "or a percentage, such as \"25%\""),
        ("[gpu]", "\"auto\", \"off\", an ordinal such as 0, or a UUID"),
        ("gpu = -1", "\"auto\", \"off\", an ordinal such as 0, or a UUID"),
        ("gpu = \"none\"", "\"auto\", \"off\", an ordinal such as 0, or a UUID"),
        ("promotion = \"always\"", "the number of a read from 1 on, \"gather:2\""),
        ("promotion = 0", "the number of a read from 1 on, \"gather:2\""),
        ("promotion = 1.5", "the number of a read from 1 on, \"gather:2\""),
        ("gather_promotion = \"2nd\"", "the number of a gather from 1 on, or \"never\""),
        ("gather_promotion = 0", "the number of a gather from 1 on, or \"never\""),
        ("promotion = \"gather:2\"\ngather_promotion = 3", "one is enough"),
        ("io_driver = \"fastest\"", "auto, reactor, tokio-uring, blocking"),
    ] {
        let refused = refusal(text);
        assert!(refused.contains(expected), "{text}: {refused}");
        for inner in ["untagged", "overflow", "variant", "parsable"] {
            assert!(!refused.contains(inner), "{text}: {refused}");
        }
    }
}

#[test]
fn sizes_and_devices_are_read_in_every_form() {
    for (text, bytes) in [
        ("1048576", 1 << 20),
        ("\"1048576\"", 1 << 20),
        ("\" 1 MiB \"", 1 << 20),
        ("\"1.5GiB\"", 3 << 29),
        ("\"2 gb\"", 2_000_000_000),
    ] {
        let config: VirtualMemoryConfig =
            toml::from_str(&format!("host_capacity = {text}")).unwrap();
        assert_eq!(config.host_capacity(), Some(bytes), "{text}");
    }
    let uuid = "GPU-6d0f3c9e-0000-4000-8000-000000000000";
    for (text, gpu) in [
        ("\"auto\"", GpuSelection::Auto),
        ("\"off\"", GpuSelection::Off),
        ("3", GpuSelection::Device(3)),
        (&format!("{uuid:?}"), GpuSelection::Uuid(uuid.to_owned())),
    ] {
        let config: VirtualMemoryConfig = toml::from_str(&format!("gpu = {text}")).unwrap();
        assert_eq!(config.gpus(), [gpu]);
    }
    let json: VirtualMemoryConfig = serde_json::from_str(r#"{"host_capacity": "1MiB"}"#).unwrap();
    assert_eq!(json.host_capacity(), Some(1 << 20));
}
