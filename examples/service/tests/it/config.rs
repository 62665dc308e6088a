//! The file, the environment, and what is refused.

use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::time::Duration;

use vmem_service::Config;

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

/// The message of a configuration that is refused.
fn refused(file: &str, pairs: &[(&str, &str)]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("service.toml");
    std::fs::write(&path, file).unwrap();
    Config::read(Some(&path), variables(pairs)).unwrap_err().to_string()
}

#[test]
fn variables_go_before_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("service.toml");
    let file = "listen = \"127.0.0.1:1\"\n[limits]\nmax_object = \"1MiB\"\nmax_pins = 3\n\
                [store]\ndisk_path = \"/a\"\n";
    std::fs::write(&path, file).unwrap();
    let config = Config::read(
        Some(&path),
        variables(&[
            ("VMEM_SERVICE_LIMITS__MAX_OBJECT", "2MiB"),
            ("VMEM_SERVICE_LIMITS__WRITE_TIMEOUT", "5s"),
            ("VMEM_SERVICE_OTLP__ENDPOINT", "http://collector:4318"),
            ("VMEM_SERVICE_OTLP__SAMPLE_RATIO", "0.1"),
            ("VMEM_SERVICE_STORE__HOST_CAPACITY", "25%"),
            ("VMEM_SERVICE_STORE__WATERMARKS", "[0.5, 0.6]"),
            ("VMEM_SERVICE_CONFIG", "/elsewhere"),
            ("VMEM_OTHER", "x"),
        ]),
    )
    .unwrap();
    assert_eq!(config.listen.port(), 1);
    assert_eq!((config.limits.max_object, config.limits.max_pins), (2 << 20, 3));
    assert_eq!(config.limits.write_timeout, Duration::from_secs(5));
    let otlp = (config.otlp.endpoint.as_deref(), config.otlp.sample_ratio);
    assert_eq!(otlp, (Some("http://collector:4318"), 0.1));
    assert_eq!(config.store.watermarks(), (0.5, 0.6));
    // What is printed is read as the same.
    let text = config.to_toml().unwrap();
    std::fs::write(&path, &text).unwrap();
    assert_eq!(Config::read(Some(&path), []).unwrap().to_toml().unwrap(), text);
}

#[test]
fn unknown_fields_are_refused_by_name() {
    let store = "[store]\ndisk_path = \"/a\"\n";
    for (file, variable, name) in [
        (format!("port = 1\n{store}"), None, "`port`"),
        (format!("[limits]\nmax_bodies = 1\n{store}"), None, "`max_bodies`"),
        (format!("dashboards = \"all\"\n{store}"), None, "`dashboards`"),
        (format!("dashboard = \"everyone\"\n{store}"), None, "`everyone`"),
        (format!("[otlp]\nurl = \"http://a\"\n{store}"), None, "`url`"),
        (format!("{store}host_size = 1\n"), None, "`host_size`"),
        (store.to_owned(), Some("VMEM_SERVICE_PORT"), "`port`"),
        (store.to_owned(), Some("VMEM_SERVICE_LIMITS__MAX_BODIES"), "`max_bodies`"),
        (store.to_owned(), Some("VMEM_SERVICE_STORE__HOST_SIZE"), "`host_size`"),
        (store.to_owned(), Some("VMEM_SERVICE_LISTEN__PORT"), "listen"),
    ] {
        let pairs: Vec<_> = variable.iter().map(|name| (*name, "1")).collect();
        let message = refused(&file, &pairs);
        assert!(message.contains(name), "{message}");
        let place = variable.unwrap_or("line ");
        assert!(message.contains(place), "{message}");
    }
}

#[test]
fn values_that_cannot_be_are_refused_by_field() {
    let store = "[store]\ndisk_path = \"/a\"\n";
    for (file, name) in [
        (String::new(), "store.disk_path"),
        (format!("names = [\"http://a\"]\n{store}"), "names"),
        (format!("names = [\"a:80\"]\n{store}"), "names"),
        (format!("[limits]\nmax_requests = 0\n{store}"), "limits.max_requests"),
        (format!("[limits]\nmax_headers = 100\n{store}"), "limits.max_headers"),
        (format!("[limits]\nwrite_timeout = \"0s\"\n{store}"), "limits.write_timeout"),
        (format!("[limits]\nmax_copied = \"2TiB\"\n{store}"), "limits.max_copied"),
        (format!("[otlp]\nendpoint = \"https://a:4318\"\n{store}"), "otlp.endpoint"),
        (format!("[otlp]\nendpoint = \"127.0.0.1:4318\"\n{store}"), "otlp.endpoint"),
        (format!("[otlp]\nendpoint = \"http://a:b@c:4318\"\n{store}"), "otlp.endpoint"),
        (format!("[otlp]\nendpoint = \"http://a:4318?b\"\n{store}"), "otlp.endpoint"),
        (format!("[otlp]\nendpoint = \"\"\n{store}"), "otlp.endpoint"),
        (format!("[otlp]\nservice_name = \"\"\n{store}"), "otlp.service_name"),
        (format!("[otlp]\nsample_ratio = 1.5\n{store}"), "otlp.sample_ratio"),
        (format!("[otlp]\nsample_ratio = nan\n{store}"), "otlp.sample_ratio"),
        (format!("[otlp]\ntimeout = \"0s\"\n{store}"), "otlp.timeout"),
        (format!("{store}watermarks = [0.9, 0.5]\n"), "watermarks"),
        (format!("[limits]\nmax_object = \"much\"\n{store}"), "max_object"),
    ] {
        let message = refused(&file, &[]);
        assert!(message.contains(name), "{message}");
    }
}

/// Such values were accepted, and what began with them panicked, or overflowed at a request.
#[test]
fn values_beyond_what_can_be_counted_or_added_are_refused_by_field() {
    let largest = i64::MAX.to_string();
    for count in [
        "max_connections",
        "max_requests",
        "max_connections_per_client",
        "max_requests_per_client",
        "max_listed",
        "max_pins",
        "max_prefetches",
    ] {
        let variable = format!("VMEM_SERVICE_LIMITS__{}", count.to_uppercase());
        let message = refused("", &[(&variable, &largest)]);
        assert!(message.starts_with(&format!("limits.{count}: ")), "{message}");
    }
    for time in [
        "limits.header_timeout",
        "limits.body_timeout",
        "limits.rate_grace",
        "limits.write_timeout",
        "limits.max_pin",
        "limits.prefetch_timeout",
        "limits.drain_timeout",
        "limits.retry_after",
        "otlp.timeout",
    ] {
        let variable = format!("VMEM_SERVICE_{}", time.to_uppercase().replace('.', "__"));
        let message = refused("", &[(&variable, "500000000000years")]);
        assert!(message.starts_with(&format!("{time}: ")), "{message}");
    }
}

#[test]
fn check_config_prints_the_effective_values() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_vmem-service"));
    let program = program.arg("--check-config").env("VMEM_SERVICE_LIMITS__MAX_PINS", "17");
    let output = program.env("VMEM_SERVICE_STORE__DISK_PATH", "/a/b").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for line in ["max_pins = 17", "disk_path = \"/a/b\"", "listen = \"127.0.0.1:8080\""] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
    // What is no text was dropped, and the default served in its place.
    let no_text = std::ffi::OsStr::from_bytes(b"\xff");
    let output = program.env("VMEM_SERVICE_LIMITS__MAX_OBJECT", no_text).output().unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("VMEM_SERVICE_LIMITS__MAX_OBJECT: its value is not UTF-8"), "{stderr}");
    program.env_remove("VMEM_SERVICE_LIMITS__MAX_OBJECT");
    let output = program.env("VMEM_SERVICE_LIMITS__MAX_PIN", "x").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("VMEM_SERVICE_LIMITS__MAX_PIN"));
}
