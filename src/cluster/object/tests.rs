//! Objects as other electors write them, and as Peili does.

use std::time::UNIX_EPOCH;

use super::*;

/// As `kubectl get lease -o json` of Kubernetes 1.20 shows one of client-go.
const OLD: &str = r#"{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"creationTimestamp":
    "2026-11-23T10:00:00Z","name":"kube-scheduler","namespace":"kube-system","resourceVersion":"4711","uid":
    "0d6bb2c1-7d2f-4c56-9a3c-1f1d6b4c5a11"},"spec":{"acquireTime":"2026-11-23T10:00:00.000000Z","holderIdentity":
    "cp_5b2e","leaseDurationSeconds":15,"leaseTransitions":3,"renewTime":"2026-11-23T10:05:00.123456Z"}}"#;
/// As 1.31 and later have one under the API server's coordinator.
const NEW: &str = r#"{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"annotations":{"peili.dev/election":
    "7 6000 node/1","peili.dev/members":"12","peili.dev/book":"YQ== Yg=="},"name":"peili","resourceVersion":"9","uid":"u",
    "managedFields":[{"manager":"x"}]},"spec":{"holderIdentity":"node/1","leaseDurationSeconds":6,"preferredHolder":"b",
    "strategy":"OldestEmulationVersion","leaseTransitions":1,"renewTime":"2026-11-23T10:05:00.123456Z"}}"#;
/// As `kubectl get configmap -o json` of Kubernetes 1.20 shows one of client-go.
const MAP: &str = r#"{"apiVersion":"v1","data":{"a":"b"},"kind":"ConfigMap","metadata":{"annotations":{
    "control-plane.alpha.kubernetes.io/leader":"{\"holderIdentity\":\"spegel-x7k2p\",\"leaseDurationSeconds\":10,\"acquireTime\":\"2026-11-23T10:00:00Z\",\"renewTime\":\"2026-11-23T10:05:00Z\",\"leaderTransitions\":3}",
    "team":"infra"},"creationTimestamp":"2026-11-23T10:00:00Z","name":"spegel-leader-election","namespace":"spegel",
    "resourceVersion":"4711","uid":"0d6bb2c1-7d2f-4c56-9a3c-1f1d6b4c5a11"}}"#;
/// Ten minutes past ten on that day.
const NOW: u64 = 1_795_428_600;

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

fn write(holder: &str, begins: bool, released: bool) -> Write {
    Write {
        uid: "u".into(),
        version: 9,
        holder: holder.into(),
        duration: 5_500,
        transitions: 4,
        mark: Mark { writer: "node/1".into(), sequence: 8, duration: 5_500, released },
        begins,
    }
}

/// What client-go does when it writes: it replaces the record, and leaves annotations of others.
fn client_go(kind: Kind, body: &mut Value, holder: &str, seconds: u64, transitions: u64) {
    match kind {
        Kind::Lease => {
            body["spec"] = json!({"holderIdentity": holder, "leaseDurationSeconds": seconds, "acquireTime":
                "2026-11-23T10:10:00.000000Z", "renewTime": "2026-11-23T10:10:00.000000Z", "leaseTransitions": transitions});
        }
        Kind::ConfigMap => {
            body["metadata"]["annotations"][configmap::RECORD] = json!(format!(
                r#"{{"holderIdentity":"{holder}","leaseDurationSeconds":{seconds},"acquireTime":"2026-11-23T10:10:00Z","renewTime":"2026-11-23T10:10:00Z","leaderTransitions":{transitions}}}"#
            ));
        }
    }
}

#[test]
fn leases_of_old_and_new_versions_are_read() {
    let (old, notes) = parse(Kind::Lease, &value(OLD)).unwrap();
    assert_eq!((old.version, &*old.record.holder, old.record.duration), (4711, "cp_5b2e", 15_000));
    assert_eq!((old.record.transitions, old.record.preferred, old.record.mark), (3, false, None));
    assert_eq!(notes, Notes::default());
    let (new, notes) = parse(Kind::Lease, &value(NEW)).unwrap();
    let mark = Mark { writer: "node/1".into(), sequence: 7, duration: 6_000, released: false };
    assert_eq!((new.record.mark, new.record.preferred), (Some(mark), true));
    assert_eq!(notes, Notes { members: 12, book: vec![b"a".to_vec(), b"b".to_vec()] });
}

#[test]
fn a_configmap_of_client_go_is_read() {
    let (map, notes) = parse(Kind::ConfigMap, &value(MAP)).unwrap();
    assert_eq!((map.version, &*map.record.holder, map.record.duration), (4711, "spegel-x7k2p", 10_000));
    assert_eq!(map.record.renewed.as_deref(), Some("2026-11-23T10:05:00Z"));
    assert_eq!((map.record.transitions, map.record.preferred, map.record.mark), (3, false, None));
    assert_eq!(notes, Notes::default());
}

#[test]
fn a_configmap_is_written_as_client_go_reads_it() {
    let mut body = value(MAP);
    fill(Kind::ConfigMap, &mut body, &write("node/1", true, false), &Notes::default(), now());
    let record =
        |body: &Value| body["metadata"]["annotations"][configmap::RECORD].as_str().unwrap().to_owned();
    assert_eq!(
        record(&body),
        r#"{"holderIdentity":"node/1","leaseDurationSeconds":6,"acquireTime":"2026-11-23T10:10:00Z","renewTime":"2026-11-23T10:10:00Z","leaderTransitions":4}"#
    );
    assert_eq!(
        (&body["data"]["a"], &body["metadata"]["annotations"]["team"]),
        (&json!("b"), &json!("infra"))
    );
    let later = now() + Duration::from_millis(1_700);
    fill(Kind::ConfigMap, &mut body, &write("", false, true), &Notes::default(), later);
    assert_eq!(
        record(&body),
        r#"{"holderIdentity":"","leaseDurationSeconds":6,"acquireTime":"2026-11-23T10:10:00Z","renewTime":"2026-11-23T10:10:01Z","leaderTransitions":4}"#
    );
    let (object, _) = parse(Kind::ConfigMap, &body).unwrap();
    assert!(object.record.is_released());
}

/// An elector of old stops for good at a record that it cannot read.
#[test]
fn what_is_no_record_has_no_holder_and_is_replaced_by_a_whole_one() {
    let long = format!("{{\"holderIdentity\":\"{}\"}}", "x".repeat(300 << 10));
    for text in ["", "null", "[]", "7", "{", "{}", r#"{"holderIdentity":7,"acquireTime":"yesterday"}"#, &long]
    {
        let mut body = value(MAP);
        body["metadata"]["annotations"][configmap::RECORD] = json!(text);
        let (object, _) = parse(Kind::ConfigMap, &body).unwrap();
        assert_eq!(object.record, Record::default(), "{text:.40}");
        fill(Kind::ConfigMap, &mut body, &write("", false, false), &Notes::default(), now());
        let written = value(body["metadata"]["annotations"][configmap::RECORD].as_str().unwrap());
        assert_eq!(written["acquireTime"], "2026-11-23T10:10:00Z", "{text:.40}");
        assert_eq!(written["leaderTransitions"], 4, "{text:.40}");
    }
    let mut bare = json!({"metadata": {"uid": "u", "resourceVersion": "1"}});
    assert_eq!(parse(Kind::ConfigMap, &bare).unwrap().0.record, Record::default());
    fill(Kind::ConfigMap, &mut bare, &write("n", true, false), &Notes::default(), now());
    assert_eq!(&*parse(Kind::ConfigMap, &bare).unwrap().0.record.holder, "n");
}

#[test]
fn what_is_no_object_is_none() {
    for kind in [Kind::Lease, Kind::ConfigMap] {
        for text in [
            "null",
            "{}",
            "[]",
            r#"{"metadata":{"uid":"u"}}"#,
            r#"{"metadata":{"uid":"","resourceVersion":"1"}}"#,
        ] {
            assert!(parse(kind, &value(text)).is_none(), "{text}");
        }
    }
    let odd = r#"{"metadata":{"uid":"u","resourceVersion":"1","annotations":{"peili.dev/members":"-1","peili.dev/book":"!"}},
        "spec":{"holderIdentity":7,"leaseDurationSeconds":-1,"leaseTransitions":-5}}"#;
    let (object, notes) = parse(Kind::Lease, &value(odd)).unwrap();
    assert_eq!(object.record, Record::default());
    assert_eq!(notes, Notes::default());
    let long = json!({"metadata": {"uid": "u", "resourceVersion": "1"}, "spec": {"holderIdentity": "ä".repeat(9_000)}});
    assert_eq!(parse(Kind::Lease, &long).unwrap().0.record.holder.len(), IDENTITY_LIMIT);
}

#[test]
fn what_is_not_peilis_stays() {
    let mut body = value(NEW);
    body["metadata"]["labels"] = json!({"app": "x"});
    fill(Kind::Lease, &mut body, &write("", false, true), &Notes { members: 3, book: Vec::new() }, now());
    assert_eq!(body["metadata"]["labels"]["app"], "x");
    assert_eq!(body["spec"]["strategy"], "OldestEmulationVersion");
    assert_eq!(body["spec"]["leaseDurationSeconds"], 6);
    assert_eq!(body["metadata"]["annotations"]["peili.dev/members"], "12", "who gives it away says nothing");
    let (object, _) = parse(Kind::Lease, &body).unwrap();
    assert!(object.record.is_released());
}

/// client-go leaves Peili's annotations beside its own record, also beside the empty one by which it gives a lock away, of which nobody
/// knows whether its work has ended.
#[test]
fn what_another_elector_wrote_is_not_peilis_whatever_stands_beside_it() {
    for kind in [Kind::Lease, Kind::ConfigMap] {
        let mut body = json!({"metadata": {"uid": "u", "resourceVersion": "1"}});
        fill(kind, &mut body, &write("", false, true), &Notes::default(), now());
        let record = |body: &Value| parse(kind, body).unwrap().0.record;
        assert!(record(&body).is_released(), "{kind:?}");
        client_go(kind, &mut body, "cp_5b2e", 15, 5);
        assert!(!record(&body).is_ours() && !record(&body).is_released(), "{kind:?}");
        // In the same second, and with the duration of Peili's.
        for seconds in [1, 6] {
            client_go(kind, &mut body, "", seconds, 5);
            assert!(!record(&body).is_ours() && !record(&body).is_released(), "{kind:?}");
        }
        // Who takes it next leaves nothing of that.
        fill(kind, &mut body, &write("node/1", true, false), &Notes::default(), now());
        assert!(record(&body).is_ours());
        assert_eq!(body["metadata"]["annotations"].get(RELEASED), None);
    }
}

#[test]
fn what_is_wrong_is_said_of_the_right_object() {
    let api = Arc::new(Api::new(&super::super::Config { namespace: "ns".into(), ..Default::default() }));
    let lock = |kind| ObjectLock::new(kind, Arc::clone(&api), "peili");
    let answer = |kind: Kind, code: u16, creates: bool| {
        let body = json!({"kind": "Status", "message": "no", "details": {"kind": kind.resource()}});
        let response = Response { status: StatusCode::from_u16(code).unwrap(), retry_after: None, body };
        lock(kind).reply(&response, creates, creates)
    };
    let cause = |kind, code, creates| answer(kind, code, creates).fault.map(|fault| fault.cause);
    assert_eq!(cause(Kind::Lease, 403, false), Some(Cause::Forbidden));
    assert_eq!(cause(Kind::Lease, 403, true), Some(Cause::NoObject));
    assert_eq!(cause(Kind::ConfigMap, 403, false), Some(Cause::ConfigMapForbidden));
    assert_eq!(cause(Kind::ConfigMap, 403, true), Some(Cause::NoConfigMap));
    assert_eq!(answer(Kind::ConfigMap, 404, false).answer, Answer::Absent);
    let text = answer(Kind::ConfigMap, 403, true).fault.unwrap().text;
    assert!(text.contains("/api/v1/namespaces/ns/configmaps/peili does not exist"), "{text}");
    assert_eq!(lock(Kind::ConfigMap).name(), "ConfigMap peili");
}

/// As a broken proxy might answer.
#[test]
fn what_has_another_shape_than_an_object_is_written_over() {
    for kind in [Kind::Lease, Kind::ConfigMap] {
        for odd in [json!("x"), json!(7), json!([1]), json!(true)] {
            let mut body = value(NEW);
            body["metadata"]["annotations"] = odd.clone();
            body["spec"] = odd;
            fill(kind, &mut body, &write("a", true, false), &Notes::default(), now());
            assert_eq!(&*kind.record(&body).holder, "a");
        }
    }
}
