//! Configuration: applies changes to the sources of a process. Pure.

use std::collections::{HashMap, HashSet};

use contract::{
    ObjectId,
    process::{MAX_SOURCES, Process, Source, SourceSpec},
    rpc::{ErrorCode, RpcError},
    secret::Secret,
};

fn invalid(message: &str) -> RpcError {
    RpcError::new(ErrorCode::InvalidProcess, message)
}

fn source_not_found() -> RpcError {
    RpcError::new(ErrorCode::SourceNotFound, "Source not found")
}

pub(super) fn add_source(
    process: &mut Process,
    spec: &SourceSpec,
    new_id: impl FnOnce() -> ObjectId,
) -> Result<(), RpcError> {
    if spec.source_id.is_some() {
        return Err(invalid("sourceId: must be absent; a new source is given its id"));
    }
    if process.sources.len() >= MAX_SOURCES {
        return Err(invalid(&format!("sources: the process has {MAX_SOURCES}, and no more are allowed: remove one")));
    }
    check_name_is_free(process, &spec.name, None)?;
    process.sources.push(source_from_spec(spec, None, new_id)?);
    Ok(())
}

pub(super) fn put_source(process: &mut Process, source_id: ObjectId, spec: &SourceSpec) -> Result<(), RpcError> {
    let index = index_of(process, source_id)?;
    if spec.source_id.is_some_and(|given| given != source_id) {
        return Err(invalid("sourceId: differs from the source that is replaced"));
    }
    check_name_is_free(process, &spec.name, Some(source_id))?;
    process.sources[index] = source_from_spec(spec, Some(&process.sources[index]), || source_id)?;
    Ok(())
}

pub(super) fn remove_source(process: &mut Process, source_id: ObjectId) -> Result<(), RpcError> {
    let index = index_of(process, source_id)?;
    process.sources.remove(index);
    Ok(())
}

/// The sources of a specification. A source, found by its id or else by its name, keeps its id and its secrets.
pub(super) fn put_sources(
    specs: &[SourceSpec],
    stored: &[Source],
    mut new_id: impl FnMut() -> ObjectId,
) -> Result<Vec<Source>, RpcError> {
    let by_id: HashMap<_, _> = stored.iter().map(|before| (before.source_id, before)).collect();
    let by_name: HashMap<_, _> = stored.iter().map(|before| (before.name.as_str(), before)).collect();
    let mut sources = Vec::with_capacity(specs.len());
    for spec in specs {
        let before = match spec.source_id {
            Some(id) => Some(*by_id.get(&id).ok_or_else(source_not_found)?),
            None => by_name.get(spec.name.as_str()).copied(),
        };
        sources.push(source_from_spec(spec, before, &mut new_id)?);
    }
    let mut ids = HashSet::new();
    if !sources.iter().all(|source| ids.insert(source.source_id)) {
        return Err(invalid("sources: two of them are the same source, one by its id and one by its name"));
    }
    Ok(sources)
}

fn index_of(process: &Process, source_id: ObjectId) -> Result<usize, RpcError> {
    process.sources.iter().position(|source| source.source_id == source_id).ok_or_else(source_not_found)
}

fn check_name_is_free(process: &Process, name: &str, except: Option<ObjectId>) -> Result<(), RpcError> {
    if process.sources.iter().any(|source| source.name == name && Some(source.source_id) != except) {
        return Err(RpcError::new(ErrorCode::SourceExists, format!("the process has a source {name:?} already")));
    }
    Ok(())
}

/// Builds a source from a spec and the stored source that it replaces. Absent secrets are kept if the platform stays.
fn source_from_spec(
    spec: &SourceSpec,
    before: Option<&Source>,
    new_id: impl FnOnce() -> ObjectId,
) -> Result<Source, RpcError> {
    let SourceSpec { name, platform, enabled, .. } = spec;
    let secrets = match (&spec.secrets, before.filter(|before| before.platform == *platform)) {
        (Some(secrets), _) => secrets.clone(),
        (None, Some(before)) if before.secrets.iter().any(Secret::is_sealed) => {
            let message = format!("the secrets of source {name:?} cannot be opened: send them again");
            return Err(RpcError::new(ErrorCode::SecretsLocked, message));
        }
        (None, Some(before)) => before.secrets.clone(),
        (None, None) => {
            return Err(invalid(&format!(
                "source {name:?}: secrets: a source needs the secret that its platform signs with or sends"
            )));
        }
    };
    let source_id = before.map_or_else(new_id, |before| before.source_id);
    Ok(Source { source_id, name: name.clone(), platform: *platform, secrets, enabled: *enabled })
}

#[cfg(test)]
mod tests {
    use contract::process::Platform;

    use super::*;

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_bytes([byte; 12])
    }

    fn process() -> Process {
        serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":null,"revision":1,"name":"_","callbacks":[],
                "sources":[{"sourceId":"050505050505050505050505","name":"a","platform":"vapi","secrets":["s"]},
                           {"sourceId":"060606060606060606060606","name":"b","platform":"bland","secrets":["t"]}]}"#,
        )
        .unwrap()
    }

    fn spec(text: &str) -> SourceSpec {
        serde_json::from_str(text).unwrap()
    }

    fn code<T>(result: Result<T, RpcError>) -> (u16, String) {
        let Err(e) = result else { panic!("not refused") };
        (e.status, e.code)
    }

    #[test]
    fn sources_are_added_replaced_and_removed() {
        let mut process = process();

        add_source(&mut process, &spec(r#"{"name":"c","platform":"retell","secrets":["u"]}"#), || id(7)).unwrap();
        put_source(&mut process, id(5), &spec(r#"{"name":"z","platform":"vapi","enabled":false}"#)).unwrap();
        remove_source(&mut process, id(6)).unwrap();

        let found: Vec<_> = process.sources.iter().map(|source| (source.source_id, source.name.as_str())).collect();
        assert_eq!(found, [(id(5), "z"), (id(7), "c")]);
        assert_eq!((process.sources[0].enabled, &process.sources[0].secrets), (false, &vec!["s".into()]));
    }

    #[test]
    fn a_change_of_a_source_that_cannot_be_made_is_refused() {
        let mut process = process();
        let add = |process: &mut Process, text| code(add_source(process, &spec(text), || id(7)));
        let not_found = (404, "source_not_found".to_owned());
        let invalid = (400, "invalid_process".to_owned());

        assert_eq!(
            add(&mut process, r#"{"name":"a","platform":"vapi","secrets":["s"]}"#),
            (409, "source_exists".into())
        );
        assert_eq!(add(&mut process, r#"{"name":"c","platform":"vapi"}"#), invalid);
        assert_eq!(code(put_source(&mut process, id(5), &spec(r#"{"name":"a","platform":"retell"}"#))), invalid);
        assert_eq!(code(put_source(&mut process, id(9), &spec(r#"{"name":"a","platform":"vapi"}"#))), not_found);
        assert_eq!(code(remove_source(&mut process, id(9))), not_found);
        process.sources[0].secrets = vec!["sealed:v1:d3efba69:AAAA".into()];
        let locked = put_source(&mut process, id(5), &spec(r#"{"name":"a","platform":"vapi"}"#));
        assert_eq!(code(locked), (409, "secrets_locked".into()));
        process.sources = vec![process.sources[1].clone(); MAX_SOURCES];
        assert_eq!(add(&mut process, r#"{"name":"c","platform":"vapi","secrets":["s"]}"#), invalid);
    }

    #[test]
    fn a_specification_keeps_ids_and_secrets() {
        let stored = process().sources;
        let specs = [
            spec(r#"{"name":"b","platform":"bland"}"#),
            spec(r#"{"sourceId":"050505050505050505050505","name":"y","platform":"vapi"}"#),
        ];

        let made = put_sources(&specs, &stored, || id(7)).unwrap();

        assert_eq!(made[0], stored[1]);
        assert_eq!(made[1], Source { name: "y".into(), ..stored[0].clone() });
        assert_eq!(made[1].platform, Platform::Vapi);
        let twice = [
            spec(r#"{"sourceId":"060606060606060606060606","name":"y","platform":"bland"}"#),
            spec(r#"{"name":"b","platform":"bland"}"#),
        ];
        assert_eq!(code(put_sources(&twice, &stored, || id(7))).1, "invalid_process");
    }
}
